// Sixteen fp32 lanes in two AVX2 registers, with FMA. Included by avx2.cpp under its target pragma.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "compact.h"

namespace {

struct Simd {
  struct Floats {
    __m256 a, b;
  };
  struct Ints {
    __m256i a, b;
  };
  static constexpr int kVectorsPerTile = 1;  // 16 columns: there are only sixteen registers

  static Floats zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static Floats set1(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
  static Floats load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
  static void store(float* to, Floats v) {
    _mm256_storeu_ps(to, v.a);
    _mm256_storeu_ps(to + 8, v.b);
  }
  static Floats add(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  static Floats sub(Floats x, Floats y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
  static Floats mul(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  static Floats div(Floats x, Floats y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
  static Floats max(Floats x, Floats y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
  static Floats min(Floats x, Floats y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
  static Floats fma(Floats x, Floats y, Floats z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
  }
  static __m256 round_half(__m256 x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Floats round(Floats x) { return {round_half(x.a), round_half(x.b)}; }
  static __m256 scale_half(__m256 x, __m256 n) {  // n from -126 to 127
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }
  static Floats scale_by_power(Floats x, Floats n) { return {scale_half(x.a, n.a), scale_half(x.b, n.b)}; }
  static float sum(Floats x) {
    alignas(32) float lanes[16];
    store(lanes, x);
    for (int width = 8; width; width /= 2)
      for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    return lanes[0];
  }
  static float largest(Floats x) {
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, _mm256_max_ps(x.a, x.b));
    float best = lanes[0];
    for (int i = 1; i < 8; i++) best = lanes[i] > best ? lanes[i] : best;
    return best;
  }
  static Floats absolute(Floats x) {
    const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    return {_mm256_and_ps(x.a, mask), _mm256_and_ps(x.b, mask)};
  }

  static __m256 widen(__m128i bf16) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf16), 16));
  }
  static Floats load_bf16(const uint16_t* from) {
    return {widen(_mm_loadu_si128((const __m128i*)from)), widen(_mm_loadu_si128((const __m128i*)(from + 8)))};
  }
  static __m256i round_to_bf16(__m256 value) {  // in the low halves; to nearest even; a NaN stays one
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
  }
  static void store_bf16(uint16_t* to, Floats x) {
    const __m256i packed = _mm256_packus_epi32(round_to_bf16(x.a), round_to_bf16(x.b));
    _mm256_storeu_si256((__m256i*)to, _mm256_permute4x64_epi64(packed, 0xd8));
  }

  static constexpr int kBf16Rows = 4, kBf16NarrowRows = 4;  // 8 registers of accumulators, 4 of weights, 2 of activations
  using Bf16Input = float;
  struct Bf16Weights {
    Floats even, odd;
  };
  struct Bf16Pair {
    __m256 even, odd;
  };
  static Bf16Weights load_pairs(const uint16_t* from) {
    const __m256i a = _mm256_loadu_si256((const __m256i*)from), b = _mm256_loadu_si256((const __m256i*)(from + 16));
    const __m256i mask = _mm256_set1_epi32((int)0xffff0000);
    return {{_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))},
            {_mm256_castsi256_ps(_mm256_and_si256(a, mask)), _mm256_castsi256_ps(_mm256_and_si256(b, mask))}};
  }
  static Bf16Pair broadcast_pair(const float* from) {
    return {_mm256_broadcast_ss(from), _mm256_broadcast_ss(from + 1)};
  }
  static Floats dot(Floats sum, Bf16Weights w, Bf16Pair x) {
    return {_mm256_fmadd_ps(w.odd.a, x.odd, _mm256_fmadd_ps(w.even.a, x.even, sum.a)),
            _mm256_fmadd_ps(w.odd.b, x.odd, _mm256_fmadd_ps(w.even.b, x.even, sum.b))};
  }
  // The two vectors of a pair of inputs in a compact panel.
  using Table = const uint8_t*;
  static Table load_table(const uint8_t* sixteen) { return sixteen; }
  static void expand_to(Table high_bytes, Ints codes, const uint8_t* low_bytes, uint16_t* to) {
    uint8_t bytes[64];
    memcpy(bytes, &codes, sizeof bytes);
    expand_pair(high_bytes, bytes, low_bytes, to);
  }
  static void expand(Table high_bytes, Ints codes, const uint8_t* low_bytes, Bf16Weights* to) {
    uint16_t numbers[64];
    expand_to(high_bytes, codes, low_bytes, numbers);
    to[0] = load_pairs(numbers);
    to[1] = load_pairs(numbers + kPanelColumns);
  }
  static constexpr int kFloatRows = 5;

  static constexpr int kByteRows = 3, kByteNarrowRows = 3;
  static Ints load_bytes(const uint8_t* from) {
    return {_mm256_loadu_si256((const __m256i*)from), _mm256_loadu_si256((const __m256i*)(from + 32))};
  }
  static Ints broadcast_bytes(const int8_t* from) {
    int32_t four;
    memcpy(&four, from, 4);
    return set1_int(four);
  }
  static __m256i high_half(__m256i x) { return _mm256_and_si256(_mm256_srli_epi16(x, 4), _mm256_set1_epi8(15)); }
  static Ints low_nibbles(Ints x) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
  }
  static Ints high_nibbles(Ints x) { return {high_half(x.a), high_half(x.b)}; }
  static Ints set1_int(int32_t value) { return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }
  static __m256i dot_half(__m256i sum, __m256i w, __m256i x) {  // maddubs would saturate
    const __m256i w_even = _mm256_and_si256(w, _mm256_set1_epi16(0xff)), w_odd = _mm256_srli_epi16(w, 8);
    const __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), x_odd = _mm256_srai_epi16(x, 8);
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(w_even, x_even));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(w_odd, x_odd));
  }
  static Ints dot_bytes(Ints sum, Ints w, Ints x) { return {dot_half(sum.a, w.a, x.a), dot_half(sum.b, w.b, x.b)}; }
  static Floats to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
  static __m256i clamp(__m256i x) {
    return _mm256_max_epi32(_mm256_min_epi32(x, _mm256_set1_epi32(127)), _mm256_set1_epi32(-127));
  }
  static Ints store_rounded_bytes(int8_t* to, Floats value) {
    const Ints rounded = {clamp(_mm256_cvtps_epi32(value.a)), clamp(_mm256_cvtps_epi32(value.b))};
    alignas(32) int32_t lanes[16];
    _mm256_store_si256((__m256i*)lanes, rounded.a);
    _mm256_store_si256((__m256i*)(lanes + 8), rounded.b);
    for (int i = 0; i < 16; i++) to[i] = (int8_t)lanes[i];
    return rounded;
  }
  static int32_t sum_ints(Ints x) {
    alignas(32) int32_t lanes[8];
    _mm256_store_si256((__m256i*)lanes, _mm256_add_epi32(x.a, x.b));
    int32_t total = 0;
    for (int i = 0; i < 8; i++) total += lanes[i];
    return total;
  }
  static Ints add_ints(Ints x, Ints y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }

  static void prefetch(const void* address) { _mm_prefetch((const char*)address, _MM_HINT_T0); }
  static void prefetch_later(const void* address) { _mm_prefetch((const char*)address, _MM_HINT_T1); }  // not into L1
};

}  // namespace
