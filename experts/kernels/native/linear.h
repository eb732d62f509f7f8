// Products of rows with packed matrices: one matrix, or one for each head.
#pragma once

#include "rows.h"

namespace {

constexpr int kRowsPerTask = 96;  // a multiple of every tile's height that divides it well, but of AMX's

// out[row][first_column...] = product (+ residual), for the `columns` first numbers of each row of the product.
inline void store_product(const float* product, int stride, int count, void* out, int format, size_t out_at,
                          size_t out_stride, int columns, const void* residual) {
  for (int m = 0; m < count; m++) {
    const size_t at = out_at + m * out_stride;
    int i = 0;
    for (; i + 16 <= columns; i += 16) {
      Simd::Floats value = Simd::load(product + m * stride + i);
      if (residual) value = Simd::add(value, load_as_floats(residual, format, at + i));
      store_as(out, format, at + i, value);
    }
    if (i < columns) {
      Simd::Floats value = Simd::load(product + m * stride + i);
      if (residual) value = Simd::add(value, load_tail(residual, format, at + i, columns - i));
      store_tail(out, format, at + i, value, columns - i);
    }
  }
}

template <class T>
struct LinearWork {
  const LinearCall* call;
  const typename T::Row* rows;
  int panels_per_task, num_panel_tasks, rows_per_task;
  int first_row, end_row;  // of those that are multiplied now
  InputRange inputs;
  float* sums;  // of all tasks, if inputs are not multiplied at once; a task's is one tile then
};

template <class T>
void linear_task(void* context, int task, int) {
  const LinearWork<T>& work = *(const LinearWork<T>*)context;
  const LinearCall& call = *work.call;
  const Matrix& matrix = *call.matrix;
  const int panel = task % work.num_panel_tasks * work.panels_per_task;
  const int first_row = work.first_row + task / work.num_panel_tasks * work.rows_per_task;
  const int num_rows = first_row + work.rows_per_task < work.end_row ? work.rows_per_task : work.end_row - first_row;
  const int left = num_panels(matrix.num_outputs) - panel;
  const int count = left < work.panels_per_task ? left : work.panels_per_task;
  const int first_column = panel * kPanelColumns, width = count * kPanelColumns;
  const int columns = matrix.num_outputs - first_column < width ? matrix.num_outputs - first_column : width;
  const int next = count * num_threads();  // from here: the panels between are the other threads'
  const Panels panels = {&matrix, panel, panel + 1, left > next ? panel_data(matrix, panel + next) : nullptr,
                         left > next + 1 ? panel_data(matrix, panel + next + 1) : nullptr};
  const size_t padded_columns = (size_t)num_panels(matrix.num_outputs) * kPanelColumns;
  const size_t sums_before = task / work.num_panel_tasks * padded_columns + first_column;
  float* sums = work.sums ? work.sums + sums_before * work.rows_per_task : nullptr;
  for_tiles<T>(num_rows, [&](int tile, int num_tiles, int first, int height) {
    const auto store = [&](int row, int rows, const float* product) {
      const size_t at = (size_t)(first_row + first + row) * call.out_stride + first_column;
      store_product(product, width, rows, call.out, call.out_format, at, call.out_stride, columns, call.residual);
    };
    multiply_tile<T>(work.rows + first_row + first, tile, num_tiles, height, panels, count, work.inputs, sums, store);
  });
}

template <class T>
inline int rows_a_task(int num_rows) {
  if constexpr (T::kUsesAmx) return T::tile_height(num_rows);
  return kRowsPerTask;
}

template <class T>
void linear_as(const LinearCall& call) {
  const Matrix& matrix = *call.matrix;
  LinearWork<T> work = {&call, RowReader<T>::prepare(call.x, call.x_format, call.num_rows, call.x_stride,
                                                     matrix.num_inputs, matrix.group_size, kRowsSlot, kPointersSlot),
                        2, 0, rows_a_task<T>(call.num_rows), 0, call.num_rows, {0, matrix.num_inputs}, nullptr};
  arrange_rows<T>((typename T::Row*)work.rows, call.num_rows, matrix.num_inputs);
  const int panels = num_panels(matrix.num_outputs);
  if (panels < 16 * num_threads()) work.panels_per_task = 1;  // better shared out
  work.num_panel_tasks = (panels + work.panels_per_task - 1) / work.panels_per_task;
  if (!T::kUsesAmx && (call.num_rows <= 2 * kRowsPerTask || work.num_panel_tasks >= 32 * num_threads()))
    work.rows_per_task = call.num_rows;
  const int row_tasks = (call.num_rows + work.rows_per_task - 1) / work.rows_per_task;
  const int at_once = inputs_at_once<T>(matrix, smaller(work.rows_per_task, call.num_rows));
  if (at_once == matrix.num_inputs) return parallel_for(work.num_panel_tasks * row_tasks, linear_task<T>, &work);
  // Rows are multiplied one task's after another's, as many as keep all threads busy.
  const int tasks_at_once = smaller(row_tasks, 1 + 4 * num_threads() / work.num_panel_tasks);
  const size_t sums = (size_t)tasks_at_once * work.rows_per_task * panels * kPanelColumns;
  work.sums = (float*)scratch(kProductsSlot, sizeof(float) * sums);
  for (; work.first_row < call.num_rows; work.first_row = work.end_row) {
    work.end_row = smaller(work.first_row + tasks_at_once * work.rows_per_task, call.num_rows);
    const int num_tasks = (work.end_row - work.first_row + work.rows_per_task - 1) / work.rows_per_task * work.num_panel_tasks;
    for (work.inputs = {}; work.inputs.end < matrix.num_inputs; work.inputs.first = work.inputs.end) {
      work.inputs.end = smaller(work.inputs.first + at_once, matrix.num_inputs);
      parallel_for(num_tasks, linear_task<T>, &work);
    }
  }
}

template <int kFormat>
void linear_with(const LinearCall& call) {
  with_tiles<kFormat>(*call.matrix, *call.matrix, call.num_rows, [&](auto tiles) { linear_as<decltype(tiles)>(call); });
}

void linear(const LinearCall* call) {
  if (call->num_rows == 0) return;
  switch (call->matrix->format) {
    case kFloat32: return linear_as<Tiles<kFloat32>>(*call);
    case kBfloat16:
    case kCompact: return linear_with<kBfloat16>(*call);
    case kInt8: return linear_with<kInt8>(*call);
    case kInt4: return linear_with<kInt4>(*call);
  }
}

struct HeadsWork {
  const HeadsCall* call;
  int row_tasks, rows_per_task;
};

// Rows of heads are converted by the task that uses them: they are few and short.
template <class T, class Input, int kInputFormat>
void heads_task(void* context, int task, int thread) {
  const HeadsWork& work = *(const HeadsWork*)context;
  const HeadsCall& call = *work.call;
  const int head = task / work.row_tasks, first_row = task % work.row_tasks * work.rows_per_task;
  const int num_rows = first_row + work.rows_per_task < call.num_rows ? work.rows_per_task : call.num_rows - first_row;
  const Matrix& matrix = call.matrices[head];
  const int k = matrix.num_inputs, panels = num_panels(matrix.num_outputs);
  const size_t bytes = (size_t)num_rows * k * sizeof(Input);
  Input* converted = (Input*)thread_scratch(thread, (T::kUsesAmx ? 2 : 1) * bytes + kBytesBehind);
  const Input* rows[kRowsPerTask];
  for (int row = 0; row < num_rows; row++) {
    const size_t at = (size_t)(first_row + row) * call.x_stride + head * call.x_head_stride;
    rows[row] = (const Input*)call.x + at;
    if (call.x_format == kInputFormat) continue;
    convert_row(call.x, call.x_format, at, converted, kInputFormat, (size_t)row * k, k);
    rows[row] = converted + (size_t)row * k;
  }
  if constexpr (T::kUsesAmx)
    for_tiles<T>(num_rows, [&](int, int, int first, int height) {
      T::arrange_tile(rows + first, height, k, (uint8_t*)(converted + (size_t)(num_rows + first) * k));
    });
  for (int panel = 0; panel < panels; panel += 2) {
    const int count = panels - panel < 2 ? 1 : 2, first_column = panel * kPanelColumns;
    const int width = count * kPanelColumns;
    const int columns = matrix.num_outputs - first_column < width ? matrix.num_outputs - first_column : width;
    for_tiles<T>(num_rows, [&](int, int, int first, int height) {
      const Panels pair = {&matrix, panel, panel + 1};
      const size_t at = (size_t)(first_row + first) * call.out_stride + head * call.out_head_stride + first_column;
      const auto store = [&](int row, int rows, const float* product) {
        store_product(product, width, rows, call.out, call.out_format, at + (size_t)row * call.out_stride, call.out_stride,
                      columns, nullptr);
      };
      if constexpr (T::kUsesAmx) {
        multiply_tile<T>(rows + first, 0, 1, height, pair, count, {0, k}, nullptr, store);
      } else {
        alignas(64) float product[kMaxRows * 2 * kPanelColumns];
        multiply<T, kNothing>(rows + first, height, pair, count, product);
        store(0, height, product);
      }
    });
  }
}

void heads(const HeadsCall* call) {
  if (call->num_rows == 0) return;
  HeadsWork work = {call, (call->num_rows + kRowsPerTask - 1) / kRowsPerTask, kRowsPerTask};
  constexpr int kBf16Input = sizeof(Simd::Bf16Input) == 2 ? kBfloat16 : kFloat32;
  const int tasks = call->num_heads * work.row_tasks;
  if (call->matrices->format == kBfloat16)
    with_tiles<kBfloat16>(*call->matrices, *call->matrices, call->num_rows, [&](auto tiles) {
      parallel_for(tasks, heads_task<decltype(tiles), Simd::Bf16Input, kBf16Input>, &work);
    });
  else
    parallel_for(tasks, heads_task<Tiles<kFloat32>, float, kFloat32>, &work);
}

}  // namespace
