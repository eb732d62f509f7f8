// Products of a few rows with a few panels, held in registers from the first input to the last. Everything above is
// made of these. Included once by each instruction set, after its Simd.
#pragma once

#include "compact.h"
#include "thread_pool.h"

namespace {

constexpr int kMaxRows = 12;  // of a tile, in any format

// Rows as int8 with one scale a group, as an int8 or int4 product reads them.
struct QuantizedRow {
  const int8_t* numbers;   // [K]
  const float* scales;     // [K / group_size]
  const int32_t* sums;     // [K / group_size], of the group's numbers
};

// The panels of a tile, which need not be neighbours, and where those lie that are wanted after them.
struct Panels {
  const Matrix* matrix;
  int first, second;  // panel numbers; `second` is read only in tiles of two panels
  const void* next_first = nullptr;
  const void* next_second = nullptr;
  const char* fetched = nullptr;  // the part of the next panels that this tile fetches, and how far a step takes it
  ptrdiff_t fetched_a_step = 0;
  uint16_t* expanded = nullptr;  // where a compact panel is left as a plain one
};

// What a tile asks memory for while it computes. A panel's first tile would otherwise wait for memory and its other
// tiles, which find it in cache, would leave memory idle.
enum Prefetch {
  kNothing = 0,
  kAhead = 1,     // what it will read itself soon, then the beginnings of the panels that are wanted next
  kNext = 2,      // a part of the panels that are wanted next, up to a line a step
  kNextFast = 3,  // up to two
};
constexpr ptrdiff_t kAheadBytes = 4096;  // what a core computes with while memory answers

inline size_t panel_bytes(const Matrix& m) {
  const size_t k = (size_t)m.num_inputs;
  switch (m.format) {
    case kFloat32: return k * kPanelColumns * 4;
    case kBfloat16: return k * kPanelColumns * 2;
    case kInt8: return k * kPanelColumns;
    case kCompact: return k / kStepInputs * kStepBytes;
    default: return k * kPanelColumns / 2;
  }
}

inline int num_panels(int num_outputs) { return (num_outputs + kPanelColumns - 1) / kPanelColumns; }

// Fetches what a tile will read itself, a panel's end and then the beginning of the next one.
struct OwnPanel {
  const char *end, *next;
  OwnPanel(const Matrix& matrix, int panel, const void* next_panel)
      : end((const char*)matrix.data + (panel + 1) * panel_bytes(matrix)),
        next(next_panel ? (const char*)next_panel : end) {}
  void fetch(const void* at) const {
    const char* ahead = (const char*)at + kAheadBytes;
    Simd::prefetch(ahead < end ? ahead : ahead + (next - end));
  }
};

template <int kPrefetch>
struct Ahead {
  const OwnPanel a, b;
  const char* fetched;
  const ptrdiff_t fetched_a_step;
  explicit Ahead(const Panels& p)
      : a(*p.matrix, p.first, p.next_first), b(*p.matrix, p.second, p.next_second), fetched(p.fetched),
        fetched_a_step(p.fetched_a_step) {}
  void fetch_a(const void* at) const {
    if (kPrefetch == kAhead) a.fetch(at);
  }
  void fetch_b(const void* at) const {
    if (kPrefetch == kAhead) b.fetch(at);
  }
  void fetch_next() {
    if (kPrefetch < kNext) return;
    Simd::prefetch_later(fetched);
    if (kPrefetch == kNextFast) Simd::prefetch_later(fetched + 64);
    fetched += fetched_a_step;
  }
};

// In the functions below V is the number of vectors of 16 columns, j / 2 their panel; `half` is the first vector's place
// in its panel when V is 1. out: [M][16 * V].

template <int M, int V, int kPrefetch>
inline void tile_bf16(const Simd::Bf16Input* const* x, const uint16_t* a, const uint16_t* b, int half, int k,
                      Ahead<kPrefetch> ahead, float* out) {
  typename Simd::Floats sums[M][V];
  for (int m = 0; m < M; m++)
    for (int j = 0; j < V; j++) sums[m][j] = Simd::zero();
  const Simd::Bf16Input* rows[M];
  for (int m = 0; m < M; m++) rows[m] = x[m];
  a += half * 32;
  for (int pair = 0; pair < k / 2; pair++, a += 64, b += 64) {
    typename Simd::Bf16Weights w[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) w[j] = Simd::load_pairs((j < 2 ? a : b) + (j & 1) * 32);
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) j < 2 ? ahead.fetch_a(a + (j & 1) * 32) : ahead.fetch_b(b + (j & 1) * 32);
    ahead.fetch_next();
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) {
      const Simd::Bf16Pair input = Simd::broadcast_pair(rows[m] + 2 * pair);
#pragma GCC unroll 4
      for (int j = 0; j < V; j++) sums[m][j] = Simd::dot(sums[m][j], w[j], input);
    }
  }
  for (int m = 0; m < M; m++)
    for (int j = 0; j < V; j++) Simd::store(out + (m * V + j) * 16, sums[m][j]);
}

template <int M, int V, int kPrefetch>
inline void tile_float(const float* const* x, const float* a, const float* b, int half, int k, Ahead<kPrefetch> ahead,
                       float* out) {
  typename Simd::Floats sums[M][V];
  for (int m = 0; m < M; m++)
    for (int j = 0; j < V; j++) sums[m][j] = Simd::zero();
  const float* rows[M];
  for (int m = 0; m < M; m++) rows[m] = x[m];
  a += half * 16;
  for (int i = 0; i < k; i++, a += 32, b += 32) {
    typename Simd::Floats w[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) w[j] = Simd::load((j < 2 ? a : b) + (j & 1) * 16);
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) j < 2 ? ahead.fetch_a(a + (j & 1) * 16) : ahead.fetch_b(b + (j & 1) * 16);
    ahead.fetch_next();
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) {
      const typename Simd::Floats input = Simd::set1(rows[m][i]);
#pragma GCC unroll 4
      for (int j = 0; j < V; j++) sums[m][j] = Simd::fma(w[j], input, sums[m][j]);
    }
  }
  for (int m = 0; m < M; m++)
    for (int j = 0; j < V; j++) Simd::store(out + (m * V + j) * 16, sums[m][j]);
}

// Integers within a group, fp32 over groups. The fp32 sums live in `out`: there are no registers for both.
template <int M, int V, int kPrefetch, bool kIsInt4>
inline void tile_bytes(const QuantizedRow* x, const uint8_t* a, const uint8_t* b, const float* scales_a,
                       const float* scales_b, int half, int k, int group_size, Ahead<kPrefetch> ahead, float* out) {
  constexpr int kStep = kIsInt4 ? 64 : 128, kZeroPoint = kIsInt4 ? 8 : 128;
  for (int i = 0; i < M * V; i++) Simd::store(out + i * 16, Simd::zero());
  for (int group = 0; group * group_size < k; group++) {
    typename Simd::Ints sums[M][V];
    const int8_t* rows[M];
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) {
      rows[m] = x[m].numbers + group * group_size;
      const typename Simd::Ints start = Simd::set1_int(-kZeroPoint * x[m].sums[group]);
#pragma GCC unroll 4
      for (int j = 0; j < V; j++) sums[m][j] = start;
    }
    for (int four = 0; four < group_size / 4; four++, a += kStep, b += kStep) {
      typename Simd::Ints w[V];
      ahead.fetch_next();
      if (kIsInt4) {
#pragma GCC unroll 4
        for (int j = 0; j < V; j++) {
          const typename Simd::Ints both = Simd::load_bytes(j < 2 ? a : b);
          w[j] = ((j & 1) || half) ? Simd::high_nibbles(both) : Simd::low_nibbles(both);
        }
        ahead.fetch_a(a);
        if (V > 2) ahead.fetch_b(b);
      } else {
#pragma GCC unroll 4
        for (int j = 0; j < V; j++) w[j] = Simd::load_bytes((j < 2 ? a : b) + ((j & 1) + half) * 64);
#pragma GCC unroll 4
        for (int j = 0; j < V; j++)
          j < 2 ? ahead.fetch_a(a + ((j & 1) + half) * 64) : ahead.fetch_b(b + ((j & 1) + half) * 64);
      }
#pragma GCC unroll 12
      for (int m = 0; m < M; m++) {
        const typename Simd::Ints input = Simd::broadcast_bytes(rows[m] + 4 * four);
#pragma GCC unroll 4
        for (int j = 0; j < V; j++) sums[m][j] = Simd::dot_bytes(sums[m][j], w[j], input);
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) {
      const float* scales = (j < 2 ? scales_a : scales_b) + group * kPanelColumns + ((j & 1) + half) * 16;
      const typename Simd::Floats weight_scale = Simd::load(scales);
#pragma GCC unroll 12
      for (int m = 0; m < M; m++) {
        float* sum = out + (m * V + j) * 16;
        const typename Simd::Floats scale = Simd::mul(weight_scale, Simd::set1(x[m].scales[group]));
        Simd::store(sum, Simd::fma(Simd::to_floats(sums[m][j]), scale, Simd::load(sum)));
      }
    }
  }
}

}  // namespace

#include "compact_tile.h"

namespace {

// One format's tile with its operands taken from a Matrix. X: how it reads a row.
template <int kFormat>
struct Tiles;

template <>
struct Tiles<kBfloat16> {
  using Row = const Simd::Bf16Input*;
  static constexpr int kStep = 2;  // inputs
  static constexpr int kRows = Simd::kBf16Rows, kNarrowRows = Simd::kBf16NarrowRows;
  template <int M, int V, int kPrefetch>
  static void run(const Row* x, const Panels& p, int half, float* out) {
    if (p.matrix->format == kCompact) return tile_compact<M, V, kPrefetch>(x, p, half, Ahead<kPrefetch>(p), out);
    const uint16_t* data = (const uint16_t*)p.matrix->data;
    const size_t panel = (size_t)p.matrix->num_inputs * kPanelColumns;
    const auto *a = data + p.first * panel, *b = data + p.second * panel;
    tile_bf16<M, V, kPrefetch>(x, a, b, half, p.matrix->num_inputs, Ahead<kPrefetch>(p), out);
  }
};

template <>
struct Tiles<kFloat32> {
  using Row = const float*;
  static constexpr int kStep = 1;
  static constexpr int kRows = Simd::kFloatRows, kNarrowRows = kRows;
  template <int M, int V, int kPrefetch>
  static void run(const Row* x, const Panels& p, int half, float* out) {
    const float* data = (const float*)p.matrix->data;
    const size_t panel = (size_t)p.matrix->num_inputs * kPanelColumns;
    const auto *a = data + p.first * panel, *b = data + p.second * panel;
    tile_float<M, V, kPrefetch>(x, a, b, half, p.matrix->num_inputs, Ahead<kPrefetch>(p), out);
  }
};

template <bool kIsInt4>
struct ByteTiles {
  using Row = QuantizedRow;
  static constexpr int kStep = 4;
  static constexpr int kRows = Simd::kByteRows, kNarrowRows = Simd::kByteNarrowRows;
  template <int M, int V, int kPrefetch>
  static void run(const Row* x, const Panels& p, int half, float* out) {
    const uint8_t* data = (const uint8_t*)p.matrix->data;
    const size_t panel = panel_bytes(*p.matrix);
    const size_t scales = (size_t)(p.matrix->num_inputs / p.matrix->group_size) * kPanelColumns;
    const uint8_t *a = data + p.first * panel, *b = data + p.second * panel;
    tile_bytes<M, V, kPrefetch, kIsInt4>(x, a, b, p.matrix->scales + p.first * scales,
                                         p.matrix->scales + p.second * scales, half, p.matrix->num_inputs,
                                         p.matrix->group_size, Ahead<kPrefetch>(p), out);
  }
};
template <>
struct Tiles<kInt8> : ByteTiles<false> {};
template <>
struct Tiles<kInt4> : ByteTiles<true> {};

template <class T, int M, int V, int kPrefetch>
inline void run_tile(const typename T::Row* x, const Panels& p, int half, float* out) {
  constexpr bool kIsOfMany = kPrefetch >= kNext;  // then tiles are at least half as high as they can be
  if constexpr (M <= (V > 2 || kIsOfMany ? T::kRows : T::kNarrowRows) && (!kIsOfMany || 2 * M >= T::kRows))
    T::template run<M, V, kPrefetch>(x, p, half, out);
}

template <class T, int V, int kPrefetch>
inline void run_rows(const typename T::Row* x, int num_rows, const Panels& p, int half, float* out) {
  switch (num_rows) {
    case 1: return run_tile<T, 1, V, kPrefetch>(x, p, half, out);
    case 2: return run_tile<T, 2, V, kPrefetch>(x, p, half, out);
    case 3: return run_tile<T, 3, V, kPrefetch>(x, p, half, out);
    case 4: return run_tile<T, 4, V, kPrefetch>(x, p, half, out);
    case 5: return run_tile<T, 5, V, kPrefetch>(x, p, half, out);
    case 6: return run_tile<T, 6, V, kPrefetch>(x, p, half, out);
    case 7: return run_tile<T, 7, V, kPrefetch>(x, p, half, out);
    case 8: return run_tile<T, 8, V, kPrefetch>(x, p, half, out);
    case 9: return run_tile<T, 9, V, kPrefetch>(x, p, half, out);
    case 10: return run_tile<T, 10, V, kPrefetch>(x, p, half, out);
    case 11: return run_tile<T, 11, V, kPrefetch>(x, p, half, out);
    case 12: return run_tile<T, 12, V, kPrefetch>(x, p, half, out);
  }
}

// Rows times one or two panels. num_rows <= T::kNarrowRows; out: [num_rows][32 * count].
template <class T, int kPrefetch>
inline void multiply(const typename T::Row* x, int num_rows, const Panels& p, int count, float* out) {
  constexpr int kVectors = Simd::kVectorsPerTile;
  const int columns = count * kPanelColumns;
  const bool is_wide = kVectors == 4 && count == 2 && num_rows <= T::kRows && !p.expanded;
  if (is_wide) return run_rows<T, 4, kPrefetch>(x, num_rows, p, 0, out);
  constexpr int kOthers = kPrefetch == kAhead ? kAhead : kNothing;  // the first of the narrower ones fetches for all
  constexpr int kWide = kVectors >= 2 ? 2 : 1;
  alignas(64) float piece[kMaxRows * 32];
  for (int i = 0; i < count; i++) {
    Panels single = p;
    if (i) {
      single.first = p.second;
      single.next_first = p.next_second;
      if (p.expanded) single.expanded = p.expanded + (size_t)p.matrix->num_inputs * kPanelColumns;
    }
    for (int half = 0; half < 2; half += kWide) {
      if (i || half)
        run_rows<T, kWide, kOthers>(x, num_rows, single, half, piece);
      else
        run_rows<T, kWide, kPrefetch>(x, num_rows, single, half, piece);
      for (int m = 0; m < num_rows; m++)
        for (int v = 0; v < kWide; v++)
          Simd::store(out + m * columns + i * kPanelColumns + (half + v) * 16, Simd::load(piece + (m * kWide + v) * 16));
    }
  }
}

// One tile of the several that cover a pair of panels. They share out the fetching of the next panels, so that memory has
// the time of two or four of them to answer. Compact panels are decoded once, by the first tile, into memory that stays
// in cache.
template <class T>
inline void multiply_tile(const typename T::Row* x, int tile, int num_tiles, int num_rows, const Panels& p, int count,
                          float* out) {
  if (num_tiles == 1) return multiply<T, kAhead>(x, num_rows, p, count, out);
  const int k = p.matrix->num_inputs, parts = num_tiles < 4 ? 1 : 2;  // of a panel
  const char* next = (const char*)(tile < parts ? p.next_first : tile < 2 * parts ? p.next_second : nullptr);
  const size_t bytes = panel_bytes(*p.matrix) / parts;
  Panels panels = p;
  if (next) panels.fetched = next + tile % parts * bytes;
  panels.fetched_a_step = bytes / (k / T::kStep);
  Matrix plain;
  if (p.matrix->format == kCompact) {
    const size_t panel = (size_t)k * kPanelColumns;
    uint16_t* expanded = (uint16_t*)own_scratch(2 * panel * sizeof(uint16_t));
    if (tile == 0) {
      panels.expanded = expanded;
    } else {
      plain = {expanded, nullptr, nullptr, kBfloat16, count * kPanelColumns, k, 0};
      panels.matrix = &plain;
      panels.first = 0;
      panels.second = 1;
    }
  }
  if (!next) return multiply<T, kNothing>(x, num_rows, panels, count, out);
  if (panels.fetched_a_step > 64) return multiply<T, kNextFast>(x, num_rows, panels, count, out);
  multiply<T, kNext>(x, num_rows, panels, count, out);
}

}  // namespace
