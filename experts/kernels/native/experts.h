// Feed-forward through a set of experts: gate and up products, SwiGLU, down product, weights, sums within placement units.
//
// Experts are taken in ascending order in groups whose intermediate rows stay in cache. For each group, first every
// (expert, panel) of gate and up is a task; then every column block of the output is a task, which goes through the
// group's experts in order. So each number of a partial sum is added up by one thread in the order of the experts. With
// AMX an expert's rows are cut into parts, each a tile; where a part's inputs do not stay in cache, each of the two
// products is done for some inputs of all rows, then the next ones.
#pragma once

#include "activations.h"
#include "linear.h"

namespace {

constexpr size_t kGroupBytes = 2 << 20;  // of intermediate rows
constexpr int kCachedPartRows = 48;  // on average: from here on a part should stay in cache from panel to panel

template <class T>
struct ExpertsWork {
  const ExpertsCall* call;
  const typename T::Row* x;       // [assignments of the group], in their order
  const int32_t* order;           // [num_assignments], ascending by expert
  const int32_t* experts;         // [num_parts], ascending: an expert has one part, with AMX one for each tile of its rows
  const int32_t* starts;          // [num_parts + 1], into `order`
  int first, last;                // of the parts: the group
  int group_start;                // first assignment of the group
  int inner_panels;               // of gate, and of up
  int hidden_stride;              // elements of a row of `hidden`
  void* hidden;                   // [assignments of the group][hidden_stride], float32 or what a tile reads
  int hidden_format;
  const typename T::Row* hidden_rows;
  float* sums;                    // [num_partial_sums][hidden_size]
  bool is_first_group, is_last_group;
  InputRange inputs;              // that are multiplied now
  float* products;                // sums of all parts and panels, if inputs are not multiplied at once
  int pairs_per_task;             // of the output's panels

  int num_rows(int part) const { return starts[part + 1] - starts[part]; }
  // The sums of a part's rows with one pair of so many.
  float* product(int part, int pair, int num_pairs) const {
    if (!products) return nullptr;
    const int rows_before = starts[part] - starts[first] + kRowsBehind * (part - first);  // each part's are rounded up
    return products + ((size_t)rows_before * num_pairs + pair * (num_rows(part) + kRowsBehind)) * 2 * kPanelColumns;
  }
};

// Panel `panel` of gate and up, and the one that a thread is likely to take next.
template <class T>
Panels gate_up_panels(const ExpertsWork<T>& work, const Matrix& matrix, int part, int panel) {
  Panels panels = {&matrix, panel, work.inner_panels + panel};
  const Matrix* next = &matrix;
  int next_panel = panel + num_threads();  // the panels between are the other threads'
  if (next_panel >= work.inner_panels) {
    if (part + 1 >= work.last) return panels;
    next = &work.call->experts[work.experts[part + 1]].w13;
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
  const int part = work.first + task / work.inner_panels, panel = task % work.inner_panels;
  const Matrix& matrix = work.call->experts[work.experts[part]].w13;
  const Panels panels = gate_up_panels(work, matrix, part, panel);
  for_tiles<T>(work.num_rows(part), [&](int tile, int num_tiles, int first, int height) {
    const int first_row = work.starts[part] - work.group_start + first;
    const auto activate = [&](int row, int rows, const float* product) {
      for (int m = row; m < row + rows; m++, product += 2 * kPanelColumns) {
        const size_t at = hidden_place(work, first_row, m, height, panel * kPanelColumns);
        for (int i = 0; i < kPanelColumns; i += 16)
          store_as(work.hidden, work.hidden_format, at + i,
                   swiglu(Simd::load(product + i), Simd::load(product + kPanelColumns + i)));
      }
    };
    float* sums = work.product(part, panel, work.inner_panels);
    multiply_tile<T>(work.x + first_row, tile, num_tiles, height, panels, 2, work.inputs, sums, activate);
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

// A part's rows times a pair of panels of the output, added to the sums.
template <class T>
void add_down(const ExpertsWork<T>& work, int part, int pair, const Panels& panels) {
  const ExpertsCall& call = *work.call;
  const int hidden_size = call.hidden_size, num_pairs = (num_panels(hidden_size) + 1) / 2;
  const int count = num_panels(hidden_size) - 2 * pair < 2 ? 1 : 2, width = count * kPanelColumns;
  const int first_column = 2 * pair * kPanelColumns, columns = smaller(width, hidden_size - first_column);
  const int start = work.starts[part];
  for_tiles<T>(work.num_rows(part), [&](int tile, int num_tiles, int first, int height) {
    const auto add = [&](int row, int rows, const float* product) {
      for (int m = row; m < row + rows; m++, product += width) {
        const int assignment = work.order[start + first + m];
        const int sum = call.partial_sum(assignment);
        add_weighted(product, call.weight(assignment), work.sums + (size_t)sum * hidden_size + first_column, columns);
      }
    };
    const typename T::Row* x = work.hidden_rows + (start - work.group_start + first);
    multiply_tile<T>(x, tile, num_tiles, height, panels, count, work.inputs, work.product(part, pair, num_pairs), add);
  });
}

template <class T>
void down_task(void* context, int task, int) {
  const ExpertsWork<T>& work = *(const ExpertsWork<T>*)context;
  const ExpertsCall& call = *work.call;
  const int hidden_size = call.hidden_size, panels = num_panels(hidden_size), num_pairs = (panels + 1) / 2;
  const int first_pair = task * work.pairs_per_task, last_pair = smaller(first_pair + work.pairs_per_task, num_pairs);
  const int first_column = 2 * first_pair * kPanelColumns;
  const int columns = smaller(2 * last_pair * kPanelColumns, hidden_size) - first_column;
  if (work.is_first_group && work.inputs.first == 0)
    for (int i = 0; i < call.num_partial_sums; i++)
      memset(work.sums + (size_t)i * hidden_size + first_column, 0, sizeof(float) * columns);
  for (int part = work.first; part < work.last; part++)
    for (int pair = first_pair; pair < last_pair; pair++) {
      const Matrix& matrix = call.experts[work.experts[part]].w2;
      Panels pair_panels = {&matrix, 2 * pair, 2 * pair + 1};
      const bool is_last = pair + 1 == last_pair;
      if (!is_last || part + 1 < work.last) {
        const Matrix& next = is_last ? call.experts[work.experts[part + 1]].w2 : matrix;
        const int next_pair = is_last ? first_pair : pair + 1;
        pair_panels.next_first = panel_data(next, 2 * next_pair);
        pair_panels.next_second = 2 * next_pair + 1 < panels ? panel_data(next, 2 * next_pair + 1) : nullptr;
      }
      add_down(work, part, pair, pair_panels);
    }
  if (!work.is_last_group || work.inputs.end < call.experts[work.experts[work.first]].w2.num_inputs) return;
  for (int i = 0; i < call.num_partial_sums; i++) {
    const size_t at = (size_t)i * hidden_size + first_column;
    if (call.residual) add_row(work.sums + at, call.residual, call.x_format, at, columns);
    if (call.out_format == kBfloat16) convert_row(work.sums, kFloat32, at, call.out, kBfloat16, at, columns);
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

// Cuts experts' rows into parts. starts: [num_experts + 1]. part_experts, part_starts: as in ExpertsWork.
template <class T>
inline int cut_parts(const int32_t* starts, const int32_t* present, int num_present, int32_t* part_experts,
                     int32_t* part_starts) {
  int num_parts = 0;
  for (int i = 0; i < num_present; i++) {
    const int expert = present[i], start = starts[expert], num_rows = starts[expert + 1] - start;
    const int height = T::kUsesAmx ? rows_a_task<T>(num_rows) : num_rows;
    for (int first = 0; first < num_rows; first += height) {
      part_experts[num_parts] = expert;
      part_starts[num_parts++] = start + first;
    }
  }
  part_starts[num_parts] = starts[present[num_present - 1] + 1];
  return num_parts;
}

// Of panels of the output: several where a part's rows stay in cache from one pair to the next.
template <class T>
inline int pairs_a_task(int num_pairs, int num_rows, int num_parts) {
  if (!T::kUsesAmx || num_rows < kCachedPartRows * num_parts) return 1;
  const int pairs = num_pairs / (4 * num_threads());
  return pairs < 1 ? 1 : pairs;
}

// Calls task for each of num_tasks and, one after another, ranges of a matrix' inputs. columns: of all products.
template <class T>
void over_inputs(ExpertsWork<T>& work, const Matrix& matrix, int columns, int num_tasks, Task task) {
  int most_rows = 0;
  for (int part = work.first; part < work.last; part++)
    if (work.num_rows(part) > most_rows) most_rows = work.num_rows(part);
  const int at_once = inputs_at_once<T>(matrix, most_rows);
  const size_t padded_rows = work.starts[work.last] - work.group_start + kRowsBehind * (work.last - work.first);
  work.products = at_once < matrix.num_inputs ? (float*)scratch(kProductsSlot, sizeof(float) * padded_rows * columns) : nullptr;
  for (work.inputs = {}; work.inputs.end < matrix.num_inputs; work.inputs.first = work.inputs.end) {
    work.inputs.end = smaller(work.inputs.first + at_once, matrix.num_inputs);
    parallel_for(num_tasks, task, &work);
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
  int32_t* part_experts = (int32_t*)scratch(kPartsSlot, sizeof(int32_t) * (2 * call.num_assignments + 1));
  int32_t* part_starts = part_experts + call.num_assignments;
  const int num_parts = cut_parts<T>(starts, present, num_present, part_experts, part_starts);
  work.experts = part_experts;
  work.starts = part_starts;
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
  const int num_pairs = (num_panels(call.hidden_size) + 1) / 2;
  for (int first = 0; first < num_parts;) {
    int last = first;
    work.group_start = part_starts[first];
    do last++;
    while (last < num_parts && (part_starts[last + 1] - work.group_start) * row_bytes <= kGroupBytes);
    const int num_assignments = part_starts[last] - work.group_start;
    work.first = first;
    work.last = last;
    work.is_first_group = first == 0;
    work.is_last_group = last == num_parts;
    typename T::Row* x = (typename T::Row*)scratch(kGroupSlot, sizeof(typename T::Row) * num_assignments);
    for (int i = 0; i < num_assignments; i++) x[i] = rows[call.row(order[work.group_start + i])];
    arrange_parts<T>(x, part_starts + first, last - first, w13.num_inputs);
    work.x = x;
    work.hidden = scratch(kHiddenSlot, num_assignments * row_bytes + kBytesBehind);
    over_inputs(work, w13, 2 * work.hidden_stride, (last - first) * work.inner_panels, gate_up_task<T>);
    work.hidden_rows = RowReader<T>::prepare(work.hidden, work.hidden_format, num_assignments, work.hidden_stride,
                                             w2.num_inputs, w2.group_size, kHiddenRowsSlot, kHiddenPointersSlot);
    if constexpr (kIsQuantized)
      arrange_parts<T>((typename T::Row*)work.hidden_rows, part_starts + first, last - first, w2.num_inputs);
    work.pairs_per_task = pairs_a_task<T>(num_pairs, num_assignments, last - first);
    const int num_tasks = (num_pairs + work.pairs_per_task - 1) / work.pairs_per_task;
    over_inputs(work, w2, 2 * num_pairs * kPanelColumns, num_tasks, down_task<T>);
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
  for (int i = 0; i < 16; i++) {
    multiply<T, kNothing>(x, kRows, panels, 2, product);
    __asm__ volatile("" : : "r"(product) : "memory");  // else it computes one product of 16 equal ones
  }
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
