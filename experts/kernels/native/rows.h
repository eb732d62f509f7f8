// Rows of activations in the form in which a tile reads them: in place where that is their form already, else converted
// or quantised into scratch memory. Each row on its own.
#pragma once

#include "thread_pool.h"
#include "tile.h"

namespace {

inline Simd::Floats load_as_floats(const void* x, int format, size_t at) {
  return format == kBfloat16 ? Simd::load_bf16((const uint16_t*)x + at) : Simd::load((const float*)x + at);
}

inline void store_as(void* out, int format, size_t at, Simd::Floats value) {
  if (format == kBfloat16)
    Simd::store_bf16((uint16_t*)out + at, value);
  else
    Simd::store((float*)out + at, value);
}

// The same for the last few numbers of a row, fewer than 16.
inline Simd::Floats load_tail(const void* x, int format, size_t at, int count) {
  alignas(64) float lanes[16] = {};
  for (int i = 0; i < count; i++) {
    if (format == kBfloat16) {
      const uint32_t bits = (uint32_t)((const uint16_t*)x)[at + i] << 16;
      memcpy(lanes + i, &bits, 4);
    } else {
      lanes[i] = ((const float*)x)[at + i];
    }
  }
  return Simd::load(lanes);
}

inline void store_tail(void* out, int format, size_t at, Simd::Floats value, int count) {
  alignas(64) float lanes[16];
  alignas(64) uint16_t halves[16];
  Simd::store(lanes, value);
  Simd::store_bf16(halves, value);
  if (format == kBfloat16)
    memcpy((uint16_t*)out + at, halves, 2 * count);
  else
    memcpy((float*)out + at, lanes, 4 * count);
}

inline void convert_row(const void* from, int from_format, size_t from_at, void* to, int to_format, size_t to_at, int n) {
  int i = 0;
  for (; i + 16 <= n; i += 16) store_as(to, to_format, to_at + i, load_as_floats(from, from_format, from_at + i));
  if (i < n) store_tail(to, to_format, to_at + i, load_tail(from, from_format, from_at + i, n - i), n - i);
}

// sums [n] += numbers, from `at` on.
inline void add_row(float* sums, const void* numbers, int format, size_t at, int n) {
  int i = 0;
  for (; i + 16 <= n; i += 16)
    Simd::store(sums + i, Simd::add(Simd::load(sums + i), load_as_floats(numbers, format, at + i)));
  if (i < n) {
    const Simd::Floats sum = Simd::add(load_tail(sums, kFloat32, i, n - i), load_tail(numbers, format, at + i, n - i));
    store_tail(sums, kFloat32, i, sum, n - i);
  }
}

// numbers [k], scales and sums [k / group_size]. A group's scale is its largest magnitude / 127.
inline void quantize_row(const void* x, int format, size_t at, int k, int group_size, int8_t* numbers, float* scales,
                         int32_t* sums) {
  for (int group = 0; group * group_size < k; group++) {
    const size_t start = at + (size_t)group * group_size;
    Simd::Floats largest = Simd::zero(), poison = Simd::zero();
    for (int i = 0; i < group_size; i += 16) {
      const Simd::Floats value = load_as_floats(x, format, start + i);
      largest = Simd::max(largest, Simd::absolute(value));
      poison = Simd::fma(value, Simd::zero(), poison);  // integers have no NaN: the scale carries it
    }
    const float magnitude = Simd::largest(largest);
    scales[group] = magnitude / 127.0f + Simd::sum(poison);
    const Simd::Floats factor = Simd::set1(magnitude > 0.0f ? 127.0f / magnitude : 0.0f);
    Simd::Ints sum = Simd::set1_int(0);
    for (int i = 0; i < group_size; i += 16)
      sum = Simd::add_ints(sum, Simd::store_rounded_bytes(numbers + (size_t)group * group_size + i,
                                                          Simd::mul(load_as_floats(x, format, start + i), factor)));
    sums[group] = Simd::sum_ints(sum);
  }
}

struct RowsCall {
  const void* x;
  int format, num_rows, k, group_size;
  size_t stride;
  void* converted;
  int converted_format;
  int8_t* numbers;
  float* scales;
  int32_t* sums;
};

inline void convert_task(void* context, int row, int) {
  const RowsCall& c = *(const RowsCall*)context;
  convert_row(c.x, c.format, row * c.stride, c.converted, c.converted_format, (size_t)row * c.k, c.k);
}

inline void quantize_task(void* context, int row, int) {
  const RowsCall& c = *(const RowsCall*)context;
  const size_t groups = c.k / c.group_size;
  quantize_row(c.x, c.format, row * c.stride, c.k, c.group_size, c.numbers + (size_t)row * c.k, c.scales + row * groups,
               c.sums + row * groups);
}

// Few numbers are converted faster than a second thread wakes.
inline void over_rows(int num_rows, int k, Task task, void* context) {
  if ((size_t)num_rows * k < 32768)
    for (int row = 0; row < num_rows; row++) task(context, row, 0);
  else
    parallel_for(num_rows, task, context);
}

template <class T>
struct RowReader;  // prepare(): [num_rows] of T::Row in scratch memory; valid until the next use of the two slots

template <class Input, int kInputFormat>
struct PlainRows {
  static const Input** prepare(const void* x, int format, int num_rows, size_t stride, int k, int, int data_slot,
                               int row_slot) {
    const Input** rows = (const Input**)scratch(row_slot, sizeof(Input*) * (num_rows + 1));
    const Input* base = (const Input*)x;
    if (format != kInputFormat) {
      RowsCall call = {x, format, num_rows, k, 0, stride, scratch(data_slot, (size_t)num_rows * k * sizeof(Input)),
                       kInputFormat, nullptr, nullptr, nullptr};
      over_rows(num_rows, k, convert_task, &call);
      base = (const Input*)call.converted;
      stride = k;
    }
    for (int row = 0; row < num_rows; row++) rows[row] = base + row * stride;
    return rows;
  }
};

template <>
struct RowReader<Tiles<kBfloat16>> : PlainRows<Simd::Bf16Input, sizeof(Simd::Bf16Input) == 2 ? kBfloat16 : kFloat32> {};
template <>
struct RowReader<Tiles<kFloat32>> : PlainRows<float, kFloat32> {};

struct QuantizedRows {
  static QuantizedRow* prepare(const void* x, int format, int num_rows, size_t stride, int k, int group_size,
                               int data_slot, int row_slot) {
    const size_t groups = k / group_size, per_row = k + groups * 8;
    char* data = (char*)scratch(data_slot, num_rows * per_row + 64);
    RowsCall call = {x, format, num_rows, k, group_size, stride, nullptr, 0, nullptr, nullptr, nullptr};
    call.scales = (float*)data;
    call.sums = (int32_t*)(data + num_rows * groups * 4);
    call.numbers = (int8_t*)(data + num_rows * groups * 8);
    over_rows(num_rows, k, quantize_task, &call);
    QuantizedRow* rows = (QuantizedRow*)scratch(row_slot, sizeof(QuantizedRow) * (num_rows + 1));
    for (int row = 0; row < num_rows; row++)
      rows[row] = {call.numbers + (size_t)row * k, call.scales + row * groups, call.sums + row * groups};
    return rows;
  }
};
template <>
struct RowReader<Tiles<kInt8>> : QuantizedRows {};
template <>
struct RowReader<Tiles<kInt4>> : QuantizedRows {};

// Calls `body(tile, num_tiles, first, count)` for tiles of nearly equal height that cover num_rows: one where one can be
// high enough, else broad ones, which read the rows less often. Those of AMX are multiples of what it takes at once.
template <class T, class Body>
inline void for_tiles(int num_rows, Body body) {
  if constexpr (T::kUsesAmx) {
    const int height = T::tile_height(num_rows);
    for (int first = 0; first < num_rows; first += height)
      body(first / height, (num_rows + height - 1) / height, first, smaller(height, num_rows - first));
  } else {
    const int max_rows = num_rows <= T::kRows.highest() ? T::kRows.highest() : T::kRows.of_many();
    const int tiles = (num_rows + max_rows - 1) / max_rows;
    for (int i = 0, first = 0; i < tiles; i++) {
      const int count = (num_rows - first + tiles - i - 1) / (tiles - i);
      body(i, tiles, first, count);
      first += count;
    }
  }
}

inline const void* panel_data(const Matrix& matrix, int panel) {
  return (const char*)matrix.data + panel * panel_bytes(matrix);
}

// Some of a matrix' inputs, whose products are added to those of the inputs before. AMX alone takes others than all.
struct InputRange {
  int first = 0, end;
};

}  // namespace

#ifdef MOBULA_AMX
#include "amx_tile.h"
#endif

namespace {

// Calls `body` with the tiles that multiply so many rows with matrices like these: an object without content, for its type.
template <int kFormat, class Body>
inline void with_tiles(const Matrix& first, const Matrix& second, int num_rows, Body body) {
#ifdef MOBULA_AMX
  using ByAmx = AmxTiles<kFormat>;
  if (num_rows >= ByAmx::kFewestRows && ByAmx::takes(first) && ByAmx::takes(second)) return body(ByAmx());
#endif
  body(Tiles<kFormat>());
}

// One tile of the num_tiles that cover one panel or two (count); num_rows: its own. done(row, rows, product [rows][32 * count])
// is called for some rows from `row` on after others, once with the last inputs, with what all inputs gave. sums: memory for
// [num_rows, with AMX rounded up to 16][32 * count], kept from some inputs to the next, of this tile alone; null where all
// inputs are multiplied at once.
template <class T, class Done>
inline void multiply_tile(const typename T::Row* x, int tile, int num_tiles, int num_rows, const Panels& p, int count,
                          InputRange inputs, float* sums, const Done& done) {
  if constexpr (T::kUsesAmx) {
    T::multiply(x, num_rows, p, count, inputs, sums, done);
  } else {
    alignas(64) float product[kMaxRows * 2 * kPanelColumns];
    if constexpr (T::kRows.half == 0)
      multiply_by_panels<T>(x, tile, num_tiles, num_rows, p, count, product);
    else if (num_tiles > 1 || num_rows > T::kRows.panel)
      multiply_by_halves<T>(x, tile, num_tiles, num_rows, p, count, product);
    else
      multiply<T, kAhead>(x, num_rows, p, count, product);
    done(0, num_rows, product);
  }
}

// How many inputs are multiplied, with all panels, before the next ones are.
template <class T>
inline int inputs_at_once(const Matrix& matrix, int num_rows) {
  if constexpr (T::kUsesAmx) return T::inputs_at_once(matrix, num_rows);
  return matrix.num_inputs;
}

// Makes rows of k inputs ready for the tiles that for_tiles cuts each part of them into. starts: [num_parts + 1], of which the
// first is the first row's.
template <class T>
inline void arrange_parts(typename T::Row* rows, const int32_t* starts, int num_parts, int k) {
  if constexpr (T::kUsesAmx) T::arrange(rows, starts, num_parts, k);
}

template <class T>
inline void arrange_rows(typename T::Row* rows, int num_rows, int k) {
  const int32_t starts[2] = {0, num_rows};
  arrange_parts<T>(rows, starts, 1, k);
}

}  // namespace
