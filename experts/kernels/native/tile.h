// Products of a few rows with a few panels, held in registers from the first input to the last. Everything above is
// made of these. Included once by each instruction set, after its Simd.
#pragma once

#include "compact.h"
#include "thread_pool.h"

namespace {

constexpr int kMaxRows = 12;  // of a tile, in any format, but for AMX's

constexpr int kRowsBehind = Simd::kHasAmx ? 16 : 0;  // so many more rows of sums a tile may write
constexpr size_t kBytesBehind = Simd::kHasAmx ? 1024 : 0;  // of the last row, which a tile may read though it does not count

// Rows as int8 with one scale a group, as an int8 or int4 product reads them.
struct QuantizedRow {
  const int8_t* numbers;   // [K]
  const float* scales;     // [K / group_size]
  const int32_t* sums;     // [K / group_size], of the group's numbers
};

inline int smaller(int a, int b) { return a < b ? a : b; }  // std::min would be one function for all instruction sets

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
constexpr int kFetchingTiles = 8;  // at most so many of a pair's tiles share out the fetching of the next one
constexpr ptrdiff_t kAheadBytes = 4096;  // what a core computes with while memory answers

// Of a panel's first inputs; all if not said.
inline size_t panel_bytes(const Matrix& m, int num_inputs = -1) {
  const size_t k = (size_t)(num_inputs < 0 ? m.num_inputs : num_inputs);
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
      : OwnPanel((const char*)matrix.data + (panel + 1) * panel_bytes(matrix), (const char*)next_panel) {}
  OwnPanel(const char* own_end, const char* next_panel) : end(own_end), next(next_panel ? next_panel : own_end) {}
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

// sums[m][first...] += a pair of inputs of every row, `at` numbers from its start, times N vectors of weights.
template <int N, class S, int M, int V>
inline __attribute__((always_inline)) void add_pair(typename S::Floats (&sums)[M][V], int first,
                                                    const typename S::Bf16Weights* w,
                                                    const typename S::Bf16Input* const* rows, int at) {
  if constexpr (S::kTakesPairsApart) {  // the even numbers first: there are no registers for both
#pragma GCC unroll 2
    for (int j = 0; j < N; j++) {
      const typename S::Floats even = S::even(w[j]);
#pragma GCC unroll 6
      for (int m = 0; m < M; m++) S::add_product(sums[m][first + j], even, rows[m] + at);
      const typename S::Floats odd = S::odd(w[j]);
#pragma GCC unroll 6
      for (int m = 0; m < M; m++) S::add_product(sums[m][first + j], odd, rows[m] + at + 1);
    }
  } else {
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) {
      const typename S::Bf16Pair input = S::broadcast_pair(rows[m] + at);
#pragma GCC unroll 4
      for (int j = 0; j < N; j++) sums[m][first + j] = S::dot(sums[m][first + j], w[j], input);
    }
  }
}

template <int M, int V, int kPrefetch>
inline void tile_bf16(const Simd::Bf16Input* const* x, const uint16_t* a, const uint16_t* b, int half, int k,
                      Ahead<kPrefetch> ahead, float* out) {
  typename Simd::Floats sums[M][V];
#pragma GCC unroll 12
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
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
    add_pair<V, Simd>(sums, 0, w, rows, 2 * pair);
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) Simd::store(out + (m * V + j) * 16, sums[m][j]);
}

template <int M, int V, int kPrefetch>
inline void tile_float(const float* const* x, const float* a, const float* b, int half, int k, Ahead<kPrefetch> ahead,
                       float* out) {
  typename Simd::Floats sums[M][V];
#pragma GCC unroll 12
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
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
#pragma GCC unroll 12
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) Simd::store(out + (m * V + j) * 16, sums[m][j]);
}

}  // namespace

#include "byte_tile.h"
#include "compact_tile.h"

namespace {

// One format's tile with its operands taken from a Matrix. Row: how it reads a row.
template <int kFormat>
struct Tiles;

struct VectorTiles {
  static constexpr bool kUsesAmx = false;  // else: AmxTiles
};

template <>
struct Tiles<kBfloat16> : VectorTiles {
  using Row = const Simd::Bf16Input*;
  static constexpr int kStep = 2;  // inputs
  static constexpr TileRows kRows = Simd::kBf16Rows;
  template <int M, int V, int kPrefetch>
  static void run(const Row* x, const Panels& p, int half, float* out) {
    if constexpr (V > 1)  // narrower tiles are given plain panels
      if (p.matrix->format == kCompact) return tile_compact<M, V, kPrefetch>(x, p, Ahead<kPrefetch>(p), out);
    const uint16_t* data = (const uint16_t*)p.matrix->data;
    const size_t panel = (size_t)p.matrix->num_inputs * kPanelColumns;
    const auto *a = data + p.first * panel, *b = data + p.second * panel;
    tile_bf16<M, V, kPrefetch>(x, a, b, half, p.matrix->num_inputs, Ahead<kPrefetch>(p), out);
  }
};

template <>
struct Tiles<kFloat32> : VectorTiles {
  using Row = const float*;
  static constexpr int kStep = 1;
  static constexpr TileRows kRows = Simd::kFloatRows;
  template <int M, int V, int kPrefetch>
  static void run(const Row* x, const Panels& p, int half, float* out) {
    const float* data = (const float*)p.matrix->data;
    const size_t panel = (size_t)p.matrix->num_inputs * kPanelColumns;
    const auto *a = data + p.first * panel, *b = data + p.second * panel;
    tile_float<M, V, kPrefetch>(x, a, b, half, p.matrix->num_inputs, Ahead<kPrefetch>(p), out);
  }
};

template <bool kIsInt4>
struct ByteTiles : VectorTiles {
  using Row = QuantizedRow;
  static constexpr int kStep = 4;
  static constexpr TileRows kRows = kIsInt4 ? Simd::kInt4Rows : Simd::kInt8Rows;
  template <int M, int V, int kPrefetch>
  static void run(const Row* x, const Panels& p, int half, float* out) {
    const uint8_t* data = (const uint8_t*)p.matrix->data;
    const size_t panel = panel_bytes(*p.matrix);
    const size_t scales = (size_t)(p.matrix->num_inputs / p.matrix->group_size) * kPanelColumns;
    const uint8_t *a = data + p.first * panel, *b = data + p.second * panel;
    const float *scales_a = p.matrix->scales + p.first * scales, *scales_b = p.matrix->scales + p.second * scales;
    const int k = p.matrix->num_inputs, group_size = p.matrix->group_size;
    const Ahead<kPrefetch> ahead(p);
    // Of several tiles with int8 weights the multiplications count, of which 16-bit numbers need no more, and no signs.
    constexpr bool kIsOfMany = !kIsInt4 && V == 1 && M <= kRows.of_many();
    if constexpr (Simd::kSumsBytesIn16Bits && !kIsOfMany)
      tile_bytes_by_16<Simd, M, V, kPrefetch, kIsInt4>(x, a, scales_a, half, k, group_size, ahead, out);
    else
      tile_bytes<Simd, M, V, kPrefetch, kIsInt4>(x, a, b, scales_a, scales_b, half, k, group_size, ahead, out);
  }
};
template <>
struct Tiles<kInt8> : ByteTiles<false> {};
template <>
struct Tiles<kInt4> : ByteTiles<true> {};

template <class T, int M, int V, int kPrefetch>
inline void run_tile(const typename T::Row* x, const Panels& p, int half, float* out) {
  constexpr bool kFetchesNext = kPrefetch >= kNext;  // done by tiles that are at least half as high as they can be
  constexpr int kMost = kFetchesNext && V > 1 ? T::kRows.of_many() : T::kRows.of(V);
  if constexpr (M <= kMost && (!kFetchesNext || 2 * M >= kMost)) T::template run<M, V, kPrefetch>(x, p, half, out);
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

// Rows times one or two panels, kWide vectors at a time.
template <class T, int kPrefetch, int kWide>
inline void multiply_by_columns(const typename T::Row* x, int num_rows, const Panels& p, int count, float* out) {
  const int columns = count * kPanelColumns;
  constexpr int kOthers = kPrefetch == kAhead ? kAhead : kNothing;  // the first of the narrower ones fetches for all
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

// Rows times one or two panels. num_rows <= T::kRows.highest(); out: [num_rows][32 * count].
template <class T, int kPrefetch>
inline void multiply(const typename T::Row* x, int num_rows, const Panels& p, int count, float* out) {
  if constexpr (T::kRows.pair > 0)
    if (count == 2 && num_rows <= T::kRows.pair && !p.expanded)
      return run_rows<T, 4, kPrefetch>(x, num_rows, p, 0, out);
  if constexpr (T::kRows.half > 0)
    if (num_rows > T::kRows.panel) return multiply_by_columns<T, kPrefetch, 1>(x, num_rows, p, count, out);
  if constexpr (T::kRows.panel > 0) multiply_by_columns<T, kPrefetch, 2>(x, num_rows, p, count, out);
}

// Where tiles are half a panel wide they pass over each panel twice. Passes share out the fetching of the next panels, and
// a compact panel is decoded before the first of them.
template <class T>
inline void multiply_by_halves(const typename T::Row* x, int tile, int num_tiles, int num_rows, const Panels& p, int count,
                               float* out) {
  static_assert(2 * (T::kRows.panel + 1) >= T::kRows.half, "run_tile has no tile of so few rows that fetches");
  const Matrix& matrix = *p.matrix;
  const int k = matrix.num_inputs, columns = count * kPanelColumns;
  const int num_fetching = num_tiles < kFetchingTiles ? num_tiles : kFetchingTiles, passes = 2 * num_fetching;  // of a panel
  const size_t panel = (size_t)k * kPanelColumns, part = panel_bytes(matrix) / passes;
  const Matrix plain = {matrix.format == kCompact ? own_scratch(2 * panel * sizeof(uint16_t)) : nullptr, nullptr, nullptr,
                        kBfloat16, columns, k, 0};
  alignas(64) float piece[kMaxRows * 16];
  for (int i = 0; i < count; i++) {
    Panels single = p;
    single.first = i ? p.second : p.first;
    if (matrix.format == kCompact) {
      if (tile == 0) expand_panel(matrix, single.first, (uint16_t*)plain.data + i * panel);
      single.matrix = &plain;
      single.first = i;
    }
    single.fetched_a_step = (part + k / T::kStep - 1) / (k / T::kStep);
    for (int half = 0; half < 2; half++) {
      const int pass = 2 * (tile * count + i) + half;
      const char* next = (const char*)(pass < passes ? p.next_first : p.next_second);
      if (next && tile < num_fetching) {
        single.fetched = next + pass % passes * part;
        run_rows<T, 1, kNext>(x, num_rows, single, half, piece);
      } else {
        run_rows<T, 1, kNothing>(x, num_rows, single, half, piece);
      }
      for (int m = 0; m < num_rows; m++)
        Simd::store(out + m * columns + i * kPanelColumns + half * 16, Simd::load(piece + m * 16));
    }
  }
}

// Tiles of whole panels: several share out the fetching of the next panels, so that memory has the time of two or four of
// them to answer. Compact panels are decoded once, by the first tile, into memory that stays in cache.
template <class T>
inline void multiply_by_panels(const typename T::Row* x, int tile, int num_tiles, int num_rows, const Panels& p, int count,
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
