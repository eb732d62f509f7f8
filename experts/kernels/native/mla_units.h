// What the kernels of multi-head latent attention share: where a token's latent row lies in the paged cache, and the two
// forms in which numbers are multiplied, float32 one by one or bfloat16 in pairs. Both are 4 bytes: a unit.
#pragma once

#include "activations.h"

namespace {

constexpr bool kHasPairs = sizeof(Simd::Bf16Input) == 2;  // of the instruction set: products of bfloat16 pairs

struct LatentRows {
  const void* cache;  // one layer's, [num_blocks][block_size][row_stride]
  const int32_t* block_table;
  int64_t row_stride;
  int block_size, format;
  const void* at(int position) const {
    const int64_t slot = (int64_t)block_table[position / block_size] * block_size + position % block_size;
    return (const uint8_t*)cache + slot * row_stride * element_bytes(format);
  }
};

struct FloatUnits {
  using Unit = float;
  using Weights = Simd::Floats;
  using Input = Simd::Floats;
  static constexpr int kNumbers = 1;  // in a unit
  static Weights load(const Unit* from) { return Simd::load(from); }
  static Input broadcast(const Unit* from) { return Simd::set1(*from); }
  static Simd::Floats dot(Simd::Floats sum, Weights w, Input x) { return Simd::fma(w, x, sum); }
};

template <class S>
struct PairUnits {
  using Unit = uint32_t;
  using Weights = typename S::Bf16Weights;
  using Input = typename S::Bf16Pair;
  static constexpr int kNumbers = 2;
  static Weights load(const Unit* from) { return S::load_pairs((const uint16_t*)from); }
  static Input broadcast(const Unit* from) { return S::broadcast_pair((const typename S::Bf16Input*)from); }
  static typename S::Floats dot(typename S::Floats sum, Weights w, Input x) { return S::dot(sum, w, x); }
};

// Pairs of what stands at the same place of two rows.
inline void interleave(const uint16_t* even, const uint16_t* odd, uint32_t* to, int n) {
  for (int i = 0; i < n; i++) to[i] = (uint32_t)even[i] | (uint32_t)odd[i] << 16;
}

inline void store_pairs(uint32_t* to, Simd::Floats even, Simd::Floats odd) {
  alignas(64) uint16_t halves[32];
  Simd::store_bf16(halves, even);
  Simd::store_bf16(halves + 16, odd);
  interleave(halves, halves + 16, to, 16);
}

// to[column][row] = from[row][column], in units.
inline void transpose(const uint32_t* from, size_t from_stride, int num_rows, int num_columns, uint32_t* to,
                      size_t to_stride) {
  for (int first = 0; first < num_columns; first += 16) {
    const int last = first + 16 < num_columns ? first + 16 : num_columns;
    for (int column = first; column < last; column++)
      for (int row = 0; row < num_rows; row++) to[column * to_stride + row] = from[row * from_stride + column];
  }
}

// A row's units: in place where its numbers are stored as they are multiplied, else converted into `buffer`.
template <class U>
inline const uint32_t* row_units(const void* x, int format, size_t at, int num_numbers, void* buffer) {
  if (format == (U::kNumbers == 2 ? kBfloat16 : kFloat32))
    return (const uint32_t*)((const uint8_t*)x + at * element_bytes(format));
  convert_row(x, format, at, buffer, U::kNumbers == 2 ? kBfloat16 : kFloat32, 0, num_numbers);
  return (const uint32_t*)buffer;
}

}  // namespace
