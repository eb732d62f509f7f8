// Sixteen fp32 lanes in one AVX-512 register. Included by the avx512*.cpp files under their target pragma, which
// define MOBULA_AVX512_BF16 where the instruction set has it. VNNI is taken for granted. With MOBULA_EMULATE_BF16 (see the
// Makefile) that form runs on processors without the two bf16 instructions, for tests.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"
#include "tile_rows.h"

namespace {

struct Simd {
  using Floats = __m512;
  using Ints = __m512i;
  static constexpr bool kHas32Registers = true;
#ifdef MOBULA_AMX
  static constexpr bool kHasAmx = true;
#else
  static constexpr bool kHasAmx = false;
#endif

  static Floats zero() { return _mm512_setzero_ps(); }
  static Floats set1(float value) { return _mm512_set1_ps(value); }
  static Floats load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, Floats value) { _mm512_storeu_ps(to, value); }
  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
  static Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
  static Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats round(Floats a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // a * 2^n for integral n
  static Floats scale_by_power(Floats a, Floats n) { return _mm512_scalef_ps(a, n); }
  static float sum(Floats a) {  // in an order of its own, the same for every call
    alignas(64) float lanes[16];
    _mm512_store_ps(lanes, a);
    for (int width = 8; width; width /= 2)
      for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    return lanes[0];
  }
  // Lane i is the sum of v[i]'s lanes; the same tree of additions for every i.
  static Floats sum_each(const Floats* v) {
    Floats quarter[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const Floats* four = v + 4 * i;
      const Floats a = _mm512_add_ps(_mm512_unpacklo_ps(four[0], four[1]), _mm512_unpackhi_ps(four[0], four[1]));
      const Floats b = _mm512_add_ps(_mm512_unpacklo_ps(four[2], four[3]), _mm512_unpackhi_ps(four[2], four[3]));
      const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
      quarter[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)), _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
    }
    const Floats low = _mm512_add_ps(_mm512_shuffle_f32x4(quarter[0], quarter[1], 0x88),
                                     _mm512_shuffle_f32x4(quarter[0], quarter[1], 0xdd));
    const Floats high = _mm512_add_ps(_mm512_shuffle_f32x4(quarter[2], quarter[3], 0x88),
                                      _mm512_shuffle_f32x4(quarter[2], quarter[3], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
  }
  // to[column][row] = from[row][column], 16 by 16.
  static void transpose(const float* from, size_t from_stride, float* to, size_t to_stride) {
    Floats rows[16];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {  // four rows to four columns of each quarter
      const Floats a = load(from + (4 * i) * from_stride), b = load(from + (4 * i + 1) * from_stride);
      const Floats c = load(from + (4 * i + 2) * from_stride), d = load(from + (4 * i + 3) * from_stride);
      const __m512d ab = _mm512_castps_pd(_mm512_unpacklo_ps(a, b)), cd = _mm512_castps_pd(_mm512_unpacklo_ps(c, d));
      const __m512d AB = _mm512_castps_pd(_mm512_unpackhi_ps(a, b)), CD = _mm512_castps_pd(_mm512_unpackhi_ps(c, d));
      rows[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
      rows[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
      rows[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(AB, CD));
      rows[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(AB, CD));
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const Floats even = _mm512_shuffle_f32x4(rows[j], rows[4 + j], 0x88), odd = _mm512_shuffle_f32x4(rows[j], rows[4 + j], 0xdd);
      const Floats Even = _mm512_shuffle_f32x4(rows[8 + j], rows[12 + j], 0x88);
      const Floats Odd = _mm512_shuffle_f32x4(rows[8 + j], rows[12 + j], 0xdd);
      store(to + j * to_stride, _mm512_shuffle_f32x4(even, Even, 0x88));
      store(to + (4 + j) * to_stride, _mm512_shuffle_f32x4(odd, Odd, 0x88));
      store(to + (8 + j) * to_stride, _mm512_shuffle_f32x4(even, Even, 0xdd));
      store(to + (12 + j) * to_stride, _mm512_shuffle_f32x4(odd, Odd, 0xdd));
    }
  }
  static float largest(Floats a) { return _mm512_reduce_max_ps(a); }
  static Floats absolute(Floats a) { return _mm512_abs_ps(a); }

  static Floats load_bf16(const uint16_t* from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16));
  }
  static __m256i to_bf16(Floats value) {  // to nearest even; a NaN stays one
#if defined(MOBULA_AVX512_BF16) && !defined(MOBULA_EMULATE_BF16)
    return (__m256i)_mm512_cvtneps_pbh(value);
#else
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    const __m512i safe = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x00400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(safe, 16));
#endif
  }
  static void store_bf16(uint16_t* to, Floats value) { _mm256_storeu_si256((__m256i*)to, to_bf16(value)); }
  // The two numbers of a lane side by side, the even one in the low half.
  static void store_bf16_pairs(uint32_t* to, Floats even, Floats odd) {
    const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(to_bf16(odd)), 16);
    _mm512_storeu_si512(to, _mm512_or_si512(_mm512_cvtepu16_epi32(to_bf16(even)), high));
  }
  // to[i] = even[i] | odd[i] << 16, of 32 numbers.
  static void interleave(const uint16_t* even, const uint16_t* odd, uint32_t* to) {
    alignas(64) static constexpr uint16_t kOrder[64] = {
        0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
        11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
        22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
    const __m512i a = _mm512_loadu_si512(even), b = _mm512_loadu_si512(odd);
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, _mm512_load_si512(kOrder), b));
    _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi16(a, _mm512_load_si512(kOrder + 32), b));
  }

  // --- products of bf16 pairs: the panel has 16 columns x 2 numbers a vector -----------------------------------
#ifdef MOBULA_AVX512_BF16
  static constexpr bool kTakesPairsApart = false;
  static constexpr TileRows kBf16Rows = {0, 12, 6};  // 24 accumulators, 4 weights, 1 activation
  using Bf16Input = uint16_t;          // how activations are fed to a tile
#ifdef MOBULA_EMULATE_BF16
  using Bf16Weights = __m512i;
  using Bf16Pair = __m512i;
#else
  using Bf16Weights = __m512bh;
  using Bf16Pair = __m512bh;
#endif
  static Bf16Weights as_pairs(__m512i numbers) { return (Bf16Weights)numbers; }
  static Bf16Pair broadcast_pair(const uint16_t* from) {
    int32_t pair;
    memcpy(&pair, from, 4);
    return (Bf16Pair)_mm512_set1_epi32(pair);
  }
#ifdef MOBULA_EMULATE_BF16
  static Floats even(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
  static Floats odd(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000)));
  }
  static Floats dot(Floats sum, Bf16Weights w, Bf16Pair x) {
    return _mm512_fmadd_ps(even(w), even(x), _mm512_fmadd_ps(odd(w), odd(x), sum));
  }
#else
  static Floats dot(Floats sum, Bf16Weights w, Bf16Pair x) { return _mm512_dpbf16_ps(sum, w, x); }
#endif
#else
  static constexpr bool kTakesPairsApart = false;
  static constexpr TileRows kBf16Rows = {0, 12, 5};  // 24 or 20 accumulators, 4 or 8 weights, 2 activations
  using Bf16Input = float;
  struct Bf16Weights {
    Floats even, odd;
  };
  struct Bf16Pair {
    Floats even, odd;
  };
  static Bf16Weights as_pairs(__m512i pairs) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000)))};
  }
  static Bf16Pair broadcast_pair(const float* from) { return {set1(from[0]), set1(from[1])}; }
  static Floats dot(Floats sum, Bf16Weights w, Bf16Pair x) {
    return _mm512_fmadd_ps(w.odd, x.odd, _mm512_fmadd_ps(w.even, x.even, sum));
  }
#endif
  static Bf16Weights load_pairs(const uint16_t* from) { return as_pairs(_mm512_loadu_si512(from)); }
  // The two vectors of a pair of inputs in a compact panel (compact.h).
  using Table = __m512i;
  static Table load_table(const uint8_t* sixteen) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)sixteen));
  }
  static void expand(Table high_bytes, Ints codes, const uint8_t* low_bytes, Bf16Weights* to) {
    const __m512i high = _mm512_shuffle_epi8(high_bytes, codes), low = _mm512_loadu_si512(low_bytes);
    to[0] = as_pairs(_mm512_unpacklo_epi8(low, high));
    to[1] = as_pairs(_mm512_unpackhi_epi8(low, high));
  }
  static void expand_to(Table high_bytes, Ints codes, const uint8_t* low_bytes, uint16_t* to) {
    const __m512i high = _mm512_shuffle_epi8(high_bytes, codes), low = _mm512_loadu_si512(low_bytes);
    _mm512_storeu_si512(to, _mm512_unpacklo_epi8(low, high));
    _mm512_storeu_si512(to + kPanelColumns, _mm512_unpackhi_epi8(low, high));
  }
  static constexpr TileRows kFloatRows = {0, 6, 6};

  // --- products of bytes: unsigned weights, signed activations, four numbers a lane -----------------------------
  static constexpr bool kSumsBytesIn16Bits = false;
  static constexpr TileRows kInt8Rows = {0, 12, 6}, kInt4Rows = kInt8Rows;
  static Ints load_bytes(const uint8_t* from) { return _mm512_loadu_si512(from); }
  static void store_bytes(uint8_t* to, Ints bytes) { _mm512_storeu_si512(to, bytes); }
  static Ints broadcast_bytes(const int8_t* from) {
    int32_t four;
    memcpy(&four, from, 4);
    return _mm512_set1_epi32(four);
  }
  static Ints low_nibbles(Ints bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(15)); }
  static Ints high_nibbles(Ints bytes) { return _mm512_and_si512(_mm512_srli_epi16(bytes, 4), _mm512_set1_epi8(15)); }
  static Ints set1_int(int32_t value) { return _mm512_set1_epi32(value); }
  static Ints dot_bytes(Ints sum, Ints w, Ints x) {
    // As assembly: gcc 12 spills the accumulators of the intrinsic, which halves the speed.
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
  }
  static Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
  // Rounds to nearest even, saturates at -127 and 127, writes 16 bytes; returns the integers as they were written.
  static Ints store_rounded_bytes(int8_t* to, Floats value) {
    const __m512i limit = _mm512_set1_epi32(127);
    __m512i rounded = _mm512_cvtps_epi32(value);
    rounded = _mm512_max_epi32(_mm512_min_epi32(rounded, limit), _mm512_sub_epi32(_mm512_setzero_si512(), limit));
    _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8(rounded));
    return rounded;
  }
  static int32_t sum_ints(Ints a) { return _mm512_reduce_add_epi32(a); }
  static Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }

  static void prefetch(const void* address) { _mm_prefetch((const char*)address, _MM_HINT_T0); }
  static void prefetch_later(const void* address) { _mm_prefetch((const char*)address, _MM_HINT_T1); }  // not into L1
};

}  // namespace
