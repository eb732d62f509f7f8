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
  static constexpr bool kUsesAmx = false;
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
  static constexpr bool kUsesAmx = false;
  using Unit = uint32_t;
  using Weights = typename S::Bf16Weights;
  using Input = typename S::Bf16Pair;
  static constexpr int kNumbers = 2;
  static Weights load(const Unit* from) { return S::load_pairs((const uint16_t*)from); }
  static Input broadcast(const Unit* from) { return S::broadcast_pair((const typename S::Bf16Input*)from); }
  static typename S::Floats dot(typename S::Floats sum, Weights w, Input x) { return S::dot(sum, w, x); }
};

constexpr float kLog2E = 1.44269504f;

// 2 to the power of x, for x up to 127, within 2 units in the last place; what is below -126 counts as that. A softmax
// whose scores are scaled by log2(e) needs half the operations that `exponential` takes. Coefficients: Cephes' exp2f.
inline Simd::Floats power_of_two(Simd::Floats x) {
  x = Simd::max(x, Simd::set1(-126.0f));
  const Simd::Floats n = Simd::round(x), f = Simd::sub(x, n);
  Simd::Floats p = Simd::fma(Simd::set1(1.535336188e-4f), f, Simd::set1(1.339887440e-3f));
  p = Simd::fma(p, f, Simd::set1(9.618437357e-3f));
  p = Simd::fma(p, f, Simd::set1(5.550332471e-2f));
  p = Simd::fma(p, f, Simd::set1(2.402264791e-1f));
  p = Simd::fma(p, f, Simd::set1(6.931472029e-1f));
  p = Simd::fma(p, f, Simd::set1(1.0f));
  return Simd::scale_by_power(p, n);
}

// Pairs of what stands at the same place of two rows.
template <class S>
inline void interleave(const uint16_t* even, const uint16_t* odd, uint32_t* to, int n) {
  int i = 0;
  if constexpr (S::kHas32Registers)
    for (; i + 32 <= n; i += 32) S::interleave(even + i, odd + i, to + i);
  for (; i < n; i++) to[i] = (uint32_t)even[i] | (uint32_t)odd[i] << 16;
}

template <class S>
inline void store_pairs(uint32_t* to, typename S::Floats even, typename S::Floats odd) {
  if constexpr (S::kHas32Registers) {
    S::store_bf16_pairs(to, even, odd);
  } else {
    alignas(64) uint16_t halves[32];
    S::store_bf16(halves, even);
    S::store_bf16(halves + 16, odd);
    interleave<S>(halves, halves + 16, to, 16);
  }
}

// to[column][row] = from[row][column], in units.
template <class S>
inline void transpose_as(const uint32_t* from, size_t from_stride, int num_rows, int num_columns, uint32_t* to,
                         size_t to_stride) {
  for (int column = 0; column < num_columns; column += 16)
    for (int row = 0; row < num_rows; row += 16) {
      const uint32_t* block = from + row * from_stride + column;
      uint32_t* target = to + column * to_stride + row;
      const int rows = num_rows - row < 16 ? num_rows - row : 16, columns = num_columns - column < 16 ? num_columns - column : 16;
      if constexpr (S::kHas32Registers)
        if (rows == 16 && columns == 16) {
          S::transpose((const float*)block, from_stride, (float*)target, to_stride);
          continue;
        }
      for (int j = 0; j < columns; j++)
        for (int i = 0; i < rows; i++) target[j * to_stride + i] = block[i * from_stride + j];
    }
}

inline void transpose(const uint32_t* from, size_t from_stride, int num_rows, int num_columns, uint32_t* to,
                      size_t to_stride) {
  transpose_as<Simd>(from, from_stride, num_rows, num_columns, to, to_stride);
}

}  // namespace
