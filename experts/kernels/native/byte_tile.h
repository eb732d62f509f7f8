// Products of rows of bytes with int8 and int4 panels: integers within a group, fp32 over groups. Included by tile.h.
#pragma once

namespace {

// The fp32 sums live in `out`: there are no registers for both.
template <class S, int M, int V, int kPrefetch, bool kIsInt4>
inline void tile_bytes(const QuantizedRow* x, const uint8_t* a, const uint8_t* b, const float* scales_a,
                       const float* scales_b, int half, int k, int group_size, Ahead<kPrefetch> ahead, float* out) {
  constexpr int kStep = kIsInt4 ? 64 : 128, kZeroPoint = kIsInt4 ? 8 : 128;
  for (int i = 0; i < M * V; i++) S::store(out + i * 16, S::zero());
  for (int group = 0; group * group_size < k; group++) {
    typename S::Ints sums[M][V];
    const int8_t* rows[M];
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) {
      rows[m] = x[m].numbers + group * group_size;
      const typename S::Ints start = S::set1_int(-kZeroPoint * x[m].sums[group]);
#pragma GCC unroll 4
      for (int j = 0; j < V; j++) sums[m][j] = start;
    }
    for (int four = 0; four < group_size / 4; four++, a += kStep, b += kStep) {
      typename S::Ints w[V];
      ahead.fetch_next();
      if (kIsInt4) {
#pragma GCC unroll 4
        for (int j = 0; j < V; j++) {
          const typename S::Ints both = S::load_bytes(j < 2 ? a : b);
          w[j] = ((j & 1) || half) ? S::high_nibbles(both) : S::low_nibbles(both);
        }
        ahead.fetch_a(a);
        if (V > 2) ahead.fetch_b(b);
      } else {
#pragma GCC unroll 4
        for (int j = 0; j < V; j++) w[j] = S::load_bytes((j < 2 ? a : b) + ((j & 1) + half) * 64);
#pragma GCC unroll 4
        for (int j = 0; j < V; j++)
          j < 2 ? ahead.fetch_a(a + ((j & 1) + half) * 64) : ahead.fetch_b(b + ((j & 1) + half) * 64);
      }
#pragma GCC unroll 12
      for (int m = 0; m < M; m++) {
        const typename S::Ints input = S::broadcast_bytes(rows[m] + 4 * four);
#pragma GCC unroll 4
        for (int j = 0; j < V; j++) sums[m][j] = S::dot_bytes(sums[m][j], w[j], input);
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) {
      const float* scales = (j < 2 ? scales_a : scales_b) + group * kPanelColumns + ((j & 1) + half) * 16;
      const typename S::Floats weight_scale = S::load(scales);
#pragma GCC unroll 12
      for (int m = 0; m < M; m++) {
        float* sum = out + (m * V + j) * 16;
        const typename S::Floats scale = S::mul(weight_scale, S::set1(x[m].scales[group]));
        S::store(sum, S::fma(S::to_floats(sums[m][j]), scale, S::load(sum)));
      }
    }
  }
}

// The same numbers where products of bytes are summed in 16 bits (AVX2). Int4 weights are multiplied as they are stored, 0 to
// 15, and summed so for as many steps as fit, then in 32 bits, which live in memory. Int8 ones by their magnitudes, with
// activations that have taken their signs, two products at a time: those of a byte from 0 to 255 would not fit.
template <class S, int M, int V, int kPrefetch, bool kIsInt4>
inline void tile_bytes_by_16(const QuantizedRow* x, const uint8_t* a, const float* scales, int half, int k, int group_size,
                             Ahead<kPrefetch> ahead, float* out) {
  static_assert(V <= 2);
  using Ints = typename S::Ints;
  constexpr int kStep = kIsInt4 ? 64 : 128, kZeroPoint = kIsInt4 ? 8 : 0;
  constexpr int kSteps = kIsInt4 ? S::kInt4Steps : 1;
  for (int i = 0; i < M * V; i++) S::store(out + i * 16, S::zero());
  for (int group = 0; group * group_size < k; group++) {
    const int8_t* rows[M];
    Ints sums[M][V];
#pragma GCC unroll 6
    for (int m = 0; m < M; m++) {
      rows[m] = x[m].numbers + group * group_size;
#pragma GCC unroll 2
      for (int j = 0; j < V; j++) sums[m][j] = S::set1_int(-kZeroPoint * x[m].sums[group]);
    }
    const int num_steps = group_size / 4;
    for (int first = 0; first < num_steps; first += kSteps) {
      const int last = first + kSteps < num_steps ? first + kSteps : num_steps;
      Ints shorts[M][V];
      if (kIsInt4) {
#pragma GCC unroll 6
        for (int m = 0; m < M; m++)
#pragma GCC unroll 2
          for (int j = 0; j < V; j++) shorts[m][j] = S::set1_int(0);
      }
      for (int four = first; four < last; four++, a += kStep) {
        ahead.fetch_next();
        ahead.fetch_a(a);
        if (!kIsInt4) ahead.fetch_a(a + 64);
#pragma GCC unroll 2
        for (int j = 0; j < V; j++) {
          const int vector = V > 1 ? j : half;
          const Ints w = kIsInt4 ? S::nibbles(S::load_bytes(a), vector)
                                 : S::without_zero_point(S::load_bytes(a + vector * 64));
          const Ints magnitudes = kIsInt4 ? w : S::magnitudes(w);
#pragma GCC unroll 6
          for (int m = 0; m < M; m++) {
            const Ints input = S::broadcast_bytes(rows[m] + 4 * four);
            if (kIsInt4) {
              S::add_bytes_to_shorts(shorts[m][j].a, w.a, input.a);
              S::add_bytes_to_shorts(shorts[m][j].b, w.b, input.b);
            } else {
              S::add_signed_bytes(sums[m][j].a, magnitudes.a, w.a, input.a);
              S::add_signed_bytes(sums[m][j].b, magnitudes.b, w.b, input.b);
            }
          }
        }
      }
      if (kIsInt4) {
#pragma GCC unroll 6
        for (int m = 0; m < M; m++)
#pragma GCC unroll 2
          for (int j = 0; j < V; j++) sums[m][j] = S::add_ints(sums[m][j], S::sum_pairs(shorts[m][j]));
      }
    }
#pragma GCC unroll 2
    for (int j = 0; j < V; j++) {
      const typename S::Floats weight_scale = S::load(scales + group * kPanelColumns + (V > 1 ? j : half) * 16);
#pragma GCC unroll 6
      for (int m = 0; m < M; m++) {
        float* sum = out + (m * V + j) * 16;
        const typename S::Floats scale = S::mul(weight_scale, S::set1(x[m].scales[group]));
        S::store(sum, S::fma(S::to_floats(sums[m][j]), scale, S::load(sum)));
      }
    }
  }
}

}  // namespace
