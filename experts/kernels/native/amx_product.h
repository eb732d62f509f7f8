// The product that attention is made of, by AMX: pairs of bfloat16 as PairUnits has them, 16 units of a row at a step.
#pragma once

#include "amx.h"
#include "mla_units.h"

namespace {

template <class S>
struct AmxUnits : PairUnits<S> {
  static constexpr bool kUsesAmx = true;
};

constexpr int kStepUnits = kTileBytes / 4;

// sums [num_rows, rounded up to 16][64], `sums_stride` apart, (+)= x * w. x: rows x_row units apart, of which each 64 units
// lie x_slab from the last; k, a multiple of 16, units of each. w: [k][64]. Under an AmxShape of 16 rows.
template <int kBlocks>
inline void amx_multiply_blocks(const uint32_t* x, size_t x_row, size_t x_slab, const uint32_t* w, int k, float* sums,
                                size_t sums_stride, bool is_first) {
  for (int column = 0; column < 64; column += 32) {
    float* to = sums + column;
    if (is_first)
      amx_zero();
    else
      amx_load<kBlocks>(to, sums_stride);
    for (int unit = 0; unit < k; unit += kStepUnits) {
      const uint32_t *from = x + unit / 64 * x_slab + unit % 64, *weights = w + (size_t)unit * 64 + column;
      Amx::load<6>(weights, 256);
      Amx::load<7>(weights + 16, 256);
      Amx::load<4>(from, x_row * 4);
      Amx::dot_bf16<0, 4, 6>();
      Amx::dot_bf16<1, 4, 7>();
      if (kBlocks < 2) continue;
      Amx::load<5>(from + kTileRows * x_row, x_row * 4);
      Amx::dot_bf16<2, 5, 6>();
      Amx::dot_bf16<3, 5, 7>();
    }
    amx_store<kBlocks>(to, sums_stride);
  }
}

inline void amx_multiply_rows(int num_rows, const uint32_t* x, size_t x_row, size_t x_slab, const uint32_t* w, int k,
                              float* sums, size_t sums_stride, bool is_first) {
  for (int row = 0; row < num_rows; row += 2 * kTileRows, x += 2 * kTileRows * x_row, sums += 2 * kTileRows * sums_stride)
    if (num_rows - row > kTileRows)
      amx_multiply_blocks<2>(x, x_row, x_slab, w, k, sums, sums_stride, is_first);
    else
      amx_multiply_blocks<1>(x, x_row, x_slab, w, k, sums, sums_stride, is_first);
}

}  // namespace
