// The product that attention is made of: sums that stay where they are from one slab of inputs to the next, so that the
// operands of a slab stay in the first-level cache.
#pragma once

#include "mla_units.h"
#ifdef MOBULA_AMX
#include "amx_product.h"
#endif

namespace {

constexpr int kSlab = 64;           // units of a row that lie side by side
constexpr int kInputsPerFetch = 4;  // between two prefetches
constexpr bool kIsWide = Simd::kHas32Registers;
constexpr int kBlockRows = Simd::kFloatRows.of_many(), kBlockVectors = kIsWide ? 4 : 1;  // of a product's largest tile
constexpr int kBlockColumns = 64;

inline int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

// What a task that multiplies holds meanwhile.
template <class U>
struct ProductScope {
  ProductScope() {}
};
#ifdef MOBULA_AMX
template <class S>
struct ProductScope<AmxUnits<S>> {
  const Amx amx;
  ProductScope() : amx(AmxShape(kTileRows)) {}
};
#endif

// Where to prefetch from while a product is computed.
struct Fetch {
  const char *first, *second;
};

// sums[m][16 * j...] (+)= x[m][i] * w[i][16 * j...] over i < k, one accumulator from the first i to the last. `decay`, if
// given, multiplies what is there: one factor for each m. Meanwhile cache lines from `fetch` on are asked for, one every
// few inputs, as many as the processor keeps under way.
template <class U, int M, int V, int kXRow, int kXStep, int kWStep, bool kFetches = true>
inline void accumulate(const typename U::Unit* x, const typename U::Unit* w, int k, float* sums, size_t sums_stride,
                       bool is_first, const float* decay, Fetch fetch = {}) {
  typename Simd::Floats acc[M][V];
  if (is_first) {
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
      for (int j = 0; j < V; j++) acc[m][j] = Simd::zero();
  } else {
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      const Simd::Floats factor = Simd::set1(decay ? decay[m] : 1.0f);
#pragma GCC unroll 4
      for (int j = 0; j < V; j++) {
        acc[m][j] = Simd::load(sums + m * sums_stride + j * 16);
        if (decay) acc[m][j] = Simd::mul(acc[m][j], factor);
      }
    }
  }
  const auto step = [&]() __attribute__((always_inline)) {
    typename U::Weights weights[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) weights[j] = U::load(w + j * 16);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      const typename U::Input input = U::broadcast(x + m * kXRow);
#pragma GCC unroll 4
      for (int j = 0; j < V; j++) acc[m][j] = U::dot(acc[m][j], weights[j], input);
    }
    x += kXStep;
    w += kWStep;
  };
  int i = 0;
  for (; i + kInputsPerFetch <= k; i += kInputsPerFetch) {
    if (kFetches) {
      __builtin_prefetch(fetch.first, 0, 2);
      __builtin_prefetch(fetch.second, 0, 2);
      fetch.first += 64;
      fetch.second += 64;
    }
#pragma GCC unroll 4
    for (int j = 0; j < kInputsPerFetch; j++) step();
  }
  for (; i < k; i++) step();
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) Simd::store(sums + m * sums_stride + j * 16, acc[m][j]);
}

template <class U, int M, int kXRow>
inline void accumulate_rows(const typename U::Unit* x, const typename U::Unit* w, int k, float* sums, size_t sums_stride,
                            bool is_first, const float* decay) {
  for (int column = 0; column < kBlockColumns; column += 16 * kBlockVectors)
    accumulate<U, M, kBlockVectors, kXRow, 1, kBlockColumns, false>(x, w + column, k, sums + column, sums_stride, is_first,
                                                                    decay);
}

// Up to kBlockRows rows, kXRow units apart, times [k][64] units; see accumulate.
template <class U, int kXRow>
inline void multiply_rows(int num_rows, const typename U::Unit* x, const typename U::Unit* w, int k, float* sums,
                          size_t sums_stride, bool is_first, const float* decay) {
  switch (num_rows) {
    case 1: return accumulate_rows<U, 1, kXRow>(x, w, k, sums, sums_stride, is_first, decay);
    case 2: return accumulate_rows<U, 2, kXRow>(x, w, k, sums, sums_stride, is_first, decay);
    case 3: return accumulate_rows<U, 3, kXRow>(x, w, k, sums, sums_stride, is_first, decay);
    case 4: return accumulate_rows<U, 4, kXRow>(x, w, k, sums, sums_stride, is_first, decay);
    case 5: if constexpr (kBlockRows >= 5) return accumulate_rows<U, 5, kXRow>(x, w, k, sums, sums_stride, is_first, decay);
    default: if constexpr (kBlockRows >= 6) return accumulate_rows<U, 6, kXRow>(x, w, k, sums, sums_stride, is_first, decay);
  }
}

// x: slabs of rows, `x_slab` units from one to the next; w: [k][64]; sums: [num_rows][64], sums_stride apart.
template <class U>
inline void multiply_slabs(int num_rows, const typename U::Unit* x, size_t x_slab, const typename U::Unit* w, int k,
                           float* sums, size_t sums_stride) {
#ifdef MOBULA_AMX
  if constexpr (U::kUsesAmx) return amx_multiply_rows(num_rows, x, kSlab, x_slab, w, k, sums, sums_stride, true);
#endif
  for (int first = 0; first < k; first += kSlab) {
    const int count = k - first < kSlab ? k - first : kSlab;
    for (int row = 0; row < num_rows; row += kBlockRows)
      multiply_rows<U, kSlab>(num_rows - row < kBlockRows ? num_rows - row : kBlockRows, x + row * kSlab,
                              w + (size_t)first * kBlockColumns, count, sums + row * sums_stride, sums_stride, first == 0,
                              nullptr);
    x += x_slab;
  }
}

// A row's numbers as units in slabs, `slab_stride` units from one to the next.
template <class U>
inline void store_slabs(const void* from, int format, size_t at, int num_numbers, typename U::Unit* to, size_t slab_stride) {
  constexpr int kNumbers = kSlab * U::kNumbers;
  for (int first = 0; first < num_numbers; first += kNumbers, to += slab_stride) {
    const int count = num_numbers - first < kNumbers ? num_numbers - first : kNumbers;
    convert_row(from, format, at + first, to, U::kNumbers == 2 ? kBfloat16 : kFloat32, 0, count);
  }
}

}  // namespace
