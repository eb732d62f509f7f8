// Feed-forward through a set of experts: gate and up products, SwiGLU, down product, weights, sums within placement units.
//
// Experts are taken in ascending order in groups whose intermediate rows stay in cache. For each group, first every
// (expert, panel) of gate and up is a task; then every column block of the output is a task, which goes through the
// group's experts in order. So each number of a partial sum is added up by one thread in the order of the experts.
#pragma once

#include "activations.h"
#include "linear.h"

namespace {

constexpr size_t kGroupBytes = 2 << 20;  // of intermediate rows

template <class T>
struct ExpertsWork {
  const ExpertsCall* call;
  const typename T::Row* x;       // [assignments of the group], in their order
  const int32_t* order;           // [num_assignments], ascending by expert
  const int32_t* starts;          // [num_experts + 1], into `order`
  const int32_t* present;         // [num_present], experts with rows, ascending
  int first, last;                // of `present`: the group
  int group_start;                // first assignment of the group
  int inner_panels;               // of gate, and of up
  int hidden_stride;              // elements of a row of `hidden`
  void* hidden;                   // [assignments of the group][hidden_stride], float32 or what a tile reads
  int hidden_format;
  const typename T::Row* hidden_rows;
  float* sums;                    // [num_partial_sums][hidden_size]
  bool is_first_group, is_last_group;
};

// Panel `panel` of gate and up, and the one that a thread is likely to take next.
template <class T>
Panels gate_up_panels(const ExpertsWork<T>& work, const Matrix& matrix, int place, int panel) {
  Panels panels = {&matrix, panel, work.inner_panels + panel};
  const Matrix* next = &matrix;
  int next_panel = panel + num_threads();  // the panels between are the other threads'
  if (next_panel >= work.inner_panels) {
    if (place + 1 >= work.last) return panels;
    next = &work.call->experts[work.present[place + 1]].w13;
    next_panel -= work.inner_panels;
  }
  if (next_panel >= work.inner_panels) return panels;
  panels.next_first = panel_data(*next, next_panel);
  panels.next_second = panel_data(*next, work.inner_panels + next_panel);
  return panels;
}

// Where numbers from `column` on of a tile's row m are kept: as the down product's tiles read them, if those are AMX's.
template <class T>
inline size_t hidden_place(const ExpertsWork<T>& work, int first_row, int m, int height, int column) {
  const size_t tile = (size_t)first_row * work.hidden_stride;
  if constexpr (T::kUsesAmx)
    if (work.hidden_format == kBfloat16) return tile + amx_place(m, height, work.hidden_stride * 2, column * 2) / 2;
  return tile + (size_t)m * work.hidden_stride + column;
}

template <class T>
void gate_up_task(void* context, int task, int) {
  const ExpertsWork<T>& work = *(const ExpertsWork<T>*)context;
  const int place = work.first + task / work.inner_panels, panel = task % work.inner_panels;
  const int expert = work.present[place];
  const Matrix& matrix = work.call->experts[expert].w13;
  const int start = work.starts[expert], num_rows = work.starts[expert + 1] - start;
  const Panels panels = gate_up_panels(work, matrix, place, panel);
  for_tiles<T>(num_rows, [&](int tile, int num_tiles, int first, int height) {
    alignas(64) float product[kMaxRows * 2 * kPanelColumns];
    const int first_row = start - work.group_start + first;
    multiply_tile<T>(work.x + first_row, tile, num_tiles, height, panels, 2, product);
    for (int m = 0; m < height; m++) {
      const float* row = product + m * 2 * kPanelColumns;
      const size_t at = hidden_place(work, first_row, m, height, panel * kPanelColumns);
      for (int i = 0; i < kPanelColumns; i += 16)
        store_as(work.hidden, work.hidden_format, at + i,
                 swiglu(Simd::load(row + i), Simd::load(row + kPanelColumns + i)));
    }
  });
}

inline void add_weighted(const float* product, float weight, float* sums, int columns) {
  const Simd::Floats w = Simd::set1(weight);
  int i = 0;
  for (; i + 16 <= columns; i += 16)
    Simd::store(sums + i, Simd::fma(w, Simd::load(product + i), Simd::load(sums + i)));
  if (i < columns) {
    const Simd::Floats sum = Simd::fma(w, Simd::load(product + i), load_tail(sums, kFloat32, i, columns - i));
    store_tail(sums, kFloat32, i, sum, columns - i);
  }
}

template <class T>
void down_task(void* context, int task, int) {
  const ExpertsWork<T>& work = *(const ExpertsWork<T>*)context;
  const ExpertsCall& call = *work.call;
  const int hidden_size = call.hidden_size, panel = 2 * task;
  const int count = num_panels(hidden_size) - panel < 2 ? 1 : 2, width = count * kPanelColumns;
  const int first_column = panel * kPanelColumns;
  const int columns = hidden_size - first_column < width ? hidden_size - first_column : width;
  if (work.is_first_group)
    for (int i = 0; i < call.num_partial_sums; i++)
      memset(work.sums + (size_t)i * hidden_size + first_column, 0, sizeof(float) * columns);
  for (int i = work.first; i < work.last; i++) {
    const int expert = work.present[i], start = work.starts[expert], num_rows = work.starts[expert + 1] - start;
    Panels panels = {&call.experts[expert].w2, panel, panel + 1};
    if (i + 1 < work.last) {
      const Matrix& next = call.experts[work.present[i + 1]].w2;
      panels.next_first = panel_data(next, panel);
      panels.next_second = count == 2 ? panel_data(next, panel + 1) : nullptr;
    }
    for_tiles<T>(num_rows, [&](int tile, int num_tiles, int first, int height) {
      alignas(64) float product[kMaxRows * 2 * kPanelColumns];
      const typename T::Row* x = work.hidden_rows + (start - work.group_start + first);
      multiply_tile<T>(x, tile, num_tiles, height, panels, count, product);
      for (int m = 0; m < height; m++) {
        const int assignment = work.order[start + first + m];
        const int sum = call.partial_sum(assignment);
        add_weighted(product + m * width, call.weight(assignment),
                     work.sums + (size_t)sum * hidden_size + first_column, columns);
      }
    });
  }
  if (work.is_last_group && call.residual)
    for (int i = 0; i < call.num_partial_sums; i++) {
      const size_t at = (size_t)i * hidden_size + first_column;
      add_row(work.sums + at, call.residual, call.x_format, at, columns);
    }
  if (work.is_last_group && call.out_format == kBfloat16)
    for (int i = 0; i < call.num_partial_sums; i++) {
      const size_t at = (size_t)i * hidden_size + first_column;
      convert_row(work.sums, kFloat32, at, call.out, kBfloat16, at, columns);
    }
}

// Assignments in ascending order of their expert, stable; starts [num_experts + 1]; present: the experts with any.
inline int sort_by_expert(const ExpertsCall& call, int32_t* order, int32_t* starts, int32_t* present) {
  memset(starts, 0, sizeof(int32_t) * (call.num_experts + 1));
  for (int i = 0; i < call.num_assignments; i++) starts[call.expert_id(i) + 1]++;
  int num_present = 0;
  for (int e = 0; e < call.num_experts; e++) {
    if (starts[e + 1]) present[num_present++] = e;
    starts[e + 1] += starts[e];
  }
  for (int i = 0; i < call.num_assignments; i++) order[starts[call.expert_id(i)]++] = i;
  for (int e = call.num_experts; e > 0; e--) starts[e] = starts[e - 1];
  starts[0] = 0;
  return num_present;
}

// Makes the rows of a group of experts ready for tiles. starts: of all experts, into all assignments.
template <class T>
inline void arrange_group(typename T::Row* rows, const int32_t* starts, const int32_t* present, int num_present, int k) {
  if constexpr (T::kUsesAmx) {
    int32_t* parts = (int32_t*)scratch(kPartsSlot, sizeof(int32_t) * (num_present + 1));
    parts[0] = 0;
    for (int i = 0; i < num_present; i++) parts[i + 1] = starts[present[i] + 1] - starts[present[0]];
    arrange_parts<T>(rows, parts, num_present, k);
  }
}

template <class T>
void experts_as(const ExpertsCall& call, int32_t* order, int32_t* starts, int32_t* present, int num_present) {
  const Matrix& w13 = call.experts[present[0]].w13;
  const Matrix& w2 = call.experts[present[0]].w2;
  constexpr bool kIsQuantized = sizeof(typename T::Row) != sizeof(void*);
  ExpertsWork<T> work = {};
  work.call = &call;
  work.order = order;
  work.starts = starts;
  work.present = present;
  const typename T::Row* rows = RowReader<T>::prepare(call.x, call.x_format, call.num_rows, call.hidden_size, w13.num_inputs,
                                                      w13.group_size, kRowsSlot, kPointersSlot);
  work.inner_panels = num_panels(call.intermediate_size);
  work.hidden_stride = work.inner_panels * kPanelColumns;
  // What the down product reads: bf16 where its tiles take bf16, else float32; int8 and int4 quantise it by row.
  work.hidden_format = !kIsQuantized && w2.format != kFloat32 && sizeof(Simd::Bf16Input) == 2 ? kBfloat16 : kFloat32;
  work.sums = call.out_format == kFloat32
                  ? (float*)call.out
                  : (float*)scratch(kSumsSlot, sizeof(float) * (size_t)call.num_partial_sums * call.hidden_size);
  const size_t row_bytes = work.hidden_stride * element_bytes(work.hidden_format);
  for (int first = 0; first < num_present;) {
    int last = first;
    work.group_start = starts[present[first]];
    do last++;
    while (last < num_present && (starts[present[last] + 1] - work.group_start) * row_bytes <= kGroupBytes);
    const int num_assignments = starts[present[last - 1] + 1] - work.group_start;
    work.first = first;
    work.last = last;
    work.is_first_group = first == 0;
    work.is_last_group = last == num_present;
    typename T::Row* x = (typename T::Row*)scratch(kGroupSlot, sizeof(typename T::Row) * num_assignments);
    for (int i = 0; i < num_assignments; i++) x[i] = rows[call.row(order[work.group_start + i])];
    arrange_group<T>(x, starts, present + first, last - first, w13.num_inputs);
    work.x = x;
    work.hidden = scratch(kHiddenSlot, num_assignments * row_bytes + kBytesBehind);
    parallel_for((last - first) * work.inner_panels, gate_up_task<T>, &work);
    work.hidden_rows = RowReader<T>::prepare(work.hidden, work.hidden_format, num_assignments, work.hidden_stride,
                                             w2.num_inputs, w2.group_size, kHiddenRowsSlot, kHiddenPointersSlot);
    if constexpr (kIsQuantized)
      arrange_group<T>((typename T::Row*)work.hidden_rows, starts, present + first, last - first, w2.num_inputs);
    parallel_for((num_panels(call.hidden_size) + 1) / 2, down_task<T>, &work);
    first = last;
  }
}

template <int kFormat>
void experts_with(const ExpertsCall& call, int32_t* order, int32_t* starts, int32_t* present, int num_present) {
  const Expert& expert = call.experts[present[0]];
  with_tiles<kFormat>(expert.w13, expert.w2, call.num_assignments / num_present, [&](auto tiles) {
    experts_as<decltype(tiles)>(call, order, starts, present, num_present);
  });
}

void experts(const ExpertsCall* call) {
  int32_t* order = (int32_t*)scratch(kOrderSlot, sizeof(int32_t) * (call->num_assignments + 2 * call->num_experts + 2));
  int32_t* starts = order + call->num_assignments;
  int32_t* present = starts + call->num_experts + 1;
  const int num_present = sort_by_expert(*call, order, starts, present);
  if (num_present == 0) return;
  switch (call->experts[present[0]].w13.format) {
    case kFloat32: return experts_as<Tiles<kFloat32>>(*call, order, starts, present, num_present);
    case kBfloat16:
    case kCompact: return experts_with<kBfloat16>(*call, order, starts, present, num_present);
    case kInt8: return experts_with<kInt8>(*call, order, starts, present, num_present);
    case kInt4: return experts_with<kInt4>(*call, order, starts, present, num_present);
  }
}

// A format's largest tile, 16 times; how many rows it has.
template <class T>
int multiply_often(const Panels& panels, typename T::Row row, float* product) {
  constexpr int kRows = T::kRows.of_many();
  typename T::Row x[kRows];
  for (auto& each : x) each = row;
  __asm__ volatile("" : : "r"(x) : "memory");  // else the compiler sees that all rows are one, and sums row by row
  for (int i = 0; i < 16; i++) multiply<T, kNothing>(x, kRows, panels, 2, product);
  return kRows;
}

// Operations of one thread's largest tile over operands in its first-level cache.
double peak(int format, long iterations) {
#ifdef MOBULA_AMX
  if (format == kBfloat16) return amx_peak<Bf16Dot>(16 * iterations, kTileBytes / 2);
  if (format == kInt8 || format == kInt4) return amx_peak<BytesDot>(16 * iterations, kTileBytes);
#endif
  alignas(64) static thread_local uint8_t operands[32768];
  alignas(64) float product[kMaxRows * 2 * kPanelColumns];
  static const float one_scale[2 * kPanelColumns] = {};
  constexpr int kInputs = 64;
  Matrix matrix = {operands, one_scale, nullptr, format, 2 * kPanelColumns, kInputs, kInputs};
  const Panels panels = {&matrix, 0, 1};
  const float zero = 0.0f;
  const int32_t sum = 0;
  const void* inputs = operands + 24576;
  const QuantizedRow bytes = {(const int8_t*)inputs, &zero, &sum};
  int rows = 0;
  volatile float sink = 0.0f;
  for (long i = 0; i < iterations; i++) {
    switch (format) {
      case kInt8: rows = multiply_often<Tiles<kInt8>>(panels, bytes, product); break;
      case kInt4: rows = multiply_often<Tiles<kInt4>>(panels, bytes, product); break;
      case kBfloat16: rows = multiply_often<Tiles<kBfloat16>>(panels, (const Simd::Bf16Input*)inputs, product); break;
      default: rows = multiply_often<Tiles<kFloat32>>(panels, (const float*)inputs, product);
    }
    sink = sink + product[0];
  }
  return 2.0 * 16 * iterations * rows * 2 * kPanelColumns * kInputs;
}

// Reads as fast as one thread can: whole cache lines in order, asked for some way ahead.
float read_through(const float* data, size_t count) {
  Simd::Floats sums[4] = {Simd::zero(), Simd::zero(), Simd::zero(), Simd::zero()};
  for (size_t i = 0; i < count; i += 64) {
    for (int j = 0; j < 4; j++) Simd::prefetch(data + i + 512 + 16 * j);
    for (int j = 0; j < 4; j++) sums[j] = Simd::add(sums[j], Simd::load(data + i + 16 * j));
  }
  return Simd::sum(Simd::add(Simd::add(sums[0], sums[1]), Simd::add(sums[2], sums[3])));
}

}  // namespace
