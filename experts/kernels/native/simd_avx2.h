// Sixteen fp32 lanes in two AVX2 registers, with FMA. Included by avx2.cpp under its target pragma.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "compact.h"
#include "tile_rows.h"

namespace {

struct Simd {
  struct Floats {
    __m256 a, b;
  };
  struct Ints {
    __m256i a, b;
  };
  static constexpr bool kHas32Registers = false;
  static constexpr bool kHasAmx = false;

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

  static constexpr TileRows kBf16Rows = {6, 3, 0};  // 12 registers of sums, 2 of weights, 1 of activations
  static constexpr bool kTakesPairsApart = true;
  using Bf16Input = float;
  using Bf16Weights = Ints;  // as they are stored
  static Bf16Weights load_pairs(const uint16_t* from) { return load_bytes((const uint8_t*)from); }
  static Floats even(Ints pairs) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs.a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(pairs.b, 16))};
  }
  static Floats odd(Ints pairs) {
    const __m256i mask = _mm256_set1_epi32((int)0xffff0000);
    return {_mm256_castsi256_ps(_mm256_and_si256(pairs.a, mask)), _mm256_castsi256_ps(_mm256_and_si256(pairs.b, mask))};
  }
  static void add_product(Floats& sum, Floats w, const float* input) {
    __m256 x;
    __asm__("vbroadcastss %5, %2\n\tvfmadd231ps %2, %3, %0\n\tvfmadd231ps %2, %4, %1"
            : "+&x"(sum.a), "+x"(sum.b), "=&x"(x)
            : "x"(w.a), "x"(w.b), "m"(*input));
  }
  // The two vectors of a pair of inputs in a compact panel.
  using Table = __m256i;
  static Table load_table(const uint8_t* sixteen) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)sixteen));
  }
  static void expand(Table high_bytes, Ints codes, const uint8_t* low_bytes, Bf16Weights* to) {
    const Ints low = load_bytes(low_bytes);
    const __m256i high_a = _mm256_shuffle_epi8(high_bytes, codes.a), high_b = _mm256_shuffle_epi8(high_bytes, codes.b);
    to[0] = {_mm256_unpacklo_epi8(low.a, high_a), _mm256_unpacklo_epi8(low.b, high_b)};
    to[1] = {_mm256_unpackhi_epi8(low.a, high_a), _mm256_unpackhi_epi8(low.b, high_b)};
  }
  static void expand_to(Table high_bytes, Ints codes, const uint8_t* low_bytes, uint16_t* to) {
    Bf16Weights pairs[2];
    expand(high_bytes, codes, low_bytes, pairs);
    store_ints(to, pairs[0]);
    store_ints(to + kPanelColumns, pairs[1]);
  }
  static constexpr TileRows kFloatRows = {6, 3, 0};

  static constexpr TileRows kInt8Rows = {4, 2, 0, 3}, kInt4Rows = {6, 3, 0};
  static Ints load_bytes(const uint8_t* from) {
    return {_mm256_loadu_si256((const __m256i*)from), _mm256_loadu_si256((const __m256i*)(from + 32))};
  }
  static void store_ints(void* to, Ints x) {
    _mm256_storeu_si256((__m256i*)to, x.a);
    _mm256_storeu_si256((__m256i*)to + 1, x.b);
  }
  static Ints broadcast_bytes(const int8_t* from) {
    int32_t four;
    memcpy(&four, from, 4);
    return set1_int(four);
  }
  // Of each byte, the low nibble or the high one.
  static Ints nibbles(Ints x, int is_high) {
    const __m128i bits = _mm_cvtsi32_si128(4 * is_high);
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(_mm256_srl_epi16(x.a, bits), mask), _mm256_and_si256(_mm256_srl_epi16(x.b, bits), mask)};
  }
  static Ints low_nibbles(Ints x) { return nibbles(x, 0); }
  static Ints high_nibbles(Ints x) { return nibbles(x, 1); }
  static Ints set1_int(int32_t value) { return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }
  // Products of bytes in 16 bits, two neighbours added up. They saturate: byte_tile.h keeps below that. As assembly, here
  // and in `add_product`, because gcc 12 multiplies first and adds later, for which there are no registers.
  static constexpr bool kSumsBytesIn16Bits = true;
  static constexpr int kInt4Steps = 8;  // 8 * 2 * 15 * 127 < 32768
  static void add_bytes_to_shorts(__m256i& sum, __m256i w, __m256i x) {  // w: not negative
    __m256i products;
    __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(w), "x"(x));
  }
  static void add_signed_bytes(__m256i& sum, __m256i magnitudes, __m256i w, __m256i x) {
    __m256i products;
    __asm__("vpsignb %3, %4, %1\n\tvpmaddubsw %1, %2, %1\n\tvpmaddwd %5, %1, %1\n\tvpaddd %1, %0, %0"
            : "+x"(sum), "=&x"(products)
            : "x"(magnitudes), "x"(w), "x"(x), "x"(_mm256_set1_epi16(1)));
  }
  static Ints sum_pairs(Ints shorts) {
    const __m256i ones = _mm256_set1_epi16(1);
    return {_mm256_madd_epi16(shorts.a, ones), _mm256_madd_epi16(shorts.b, ones)};
  }
  static Ints without_zero_point(Ints x) {  // 0 to 255 as -128 to 127
    const __m256i sign = _mm256_set1_epi8((char)0x80);
    return {_mm256_xor_si256(x.a, sign), _mm256_xor_si256(x.b, sign)};
  }
  // The same in 32 bits, by products of 16-bit numbers.
  static __m256i dot_half(__m256i sum, __m256i w, __m256i x) {
    const __m256i w_even = _mm256_and_si256(w, _mm256_set1_epi16(0xff)), w_odd = _mm256_srli_epi16(w, 8);
    const __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), x_odd = _mm256_srai_epi16(x, 8);
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(w_even, x_even));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(w_odd, x_odd));
  }
  static Ints dot_bytes(Ints sum, Ints w, Ints x) { return {dot_half(sum.a, w.a, x.a), dot_half(sum.b, w.b, x.b)}; }
  static Ints magnitudes(Ints x) { return {_mm256_abs_epi8(x.a), _mm256_abs_epi8(x.b)}; }
  static Floats to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
  static __m256i clamp(__m256i x) {
    return _mm256_max_epi32(_mm256_min_epi32(x, _mm256_set1_epi32(127)), _mm256_set1_epi32(-127));
  }
  static Ints store_rounded_bytes(int8_t* to, Floats value) {
    const Ints rounded = {clamp(_mm256_cvtps_epi32(value.a)), clamp(_mm256_cvtps_epi32(value.b))};
    const __m256i shorts = _mm256_permute4x64_epi64(_mm256_packs_epi32(rounded.a, rounded.b), 0xd8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(shorts), _mm256_extracti128_si256(shorts, 1));
    _mm_storeu_si128((__m128i*)to, bytes);
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
