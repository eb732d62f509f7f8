// Sixteen fp32 lanes in plain C++, for every processor without a file of its own; compilers make vector code of it.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "compact.h"
#include "tile_rows.h"

namespace {

struct Simd {
  struct Floats {
    float v[16];
  };
  struct Ints {
    int32_t v[16];
  };
  static constexpr bool kHas32Registers = false;
  static constexpr bool kHasAmx = false;

  template <class F>
  static Floats each(F f) {
    Floats result;
    for (int i = 0; i < 16; i++) result.v[i] = f(i);
    return result;
  }
  static float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
  }
  static Floats zero() { return set1(0.0f); }
  static Floats set1(float value) {
    return each([&](int) { return value; });
  }
  static Floats load(const float* from) {
    return each([&](int i) { return from[i]; });
  }
  static void store(float* to, Floats x) { memcpy(to, x.v, sizeof x.v); }
  static Floats add(Floats x, Floats y) {
    return each([&](int i) { return x.v[i] + y.v[i]; });
  }
  static Floats sub(Floats x, Floats y) {
    return each([&](int i) { return x.v[i] - y.v[i]; });
  }
  static Floats mul(Floats x, Floats y) {
    return each([&](int i) { return x.v[i] * y.v[i]; });
  }
  static Floats div(Floats x, Floats y) {
    return each([&](int i) { return x.v[i] / y.v[i]; });
  }
  static Floats max(Floats x, Floats y) {
    return each([&](int i) { return x.v[i] > y.v[i] ? x.v[i] : y.v[i]; });
  }
  static Floats min(Floats x, Floats y) {
    return each([&](int i) { return x.v[i] < y.v[i] ? x.v[i] : y.v[i]; });
  }
  static Floats fma(Floats x, Floats y, Floats z) {
    return each([&](int i) { return fused(x.v[i], y.v[i], z.v[i]); });
  }
  static Floats round(Floats x) {
    return each([&](int i) { return nearbyintf(x.v[i]); });
  }
  static Floats scale_by_power(Floats x, Floats n) {
    return each([&](int i) { return ldexpf(x.v[i], (int)n.v[i]); });
  }
  static float sum(Floats x) {
    for (int width = 8; width; width /= 2)
      for (int i = 0; i < width; i++) x.v[i] += x.v[i + width];
    return x.v[0];
  }
  static float largest(Floats x) {
    float best = x.v[0];
    for (int i = 1; i < 16; i++) best = x.v[i] > best ? x.v[i] : best;
    return best;
  }
  static Floats absolute(Floats x) {
    return each([&](int i) { return fabsf(x.v[i]); });
  }

  static float widen(uint16_t bf16) {
    const uint32_t bits = (uint32_t)bf16 << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
  }
  static uint16_t narrow(float value) {  // to nearest even; a NaN stays one
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (value != value) return (uint16_t)((bits | 0x00400000u) >> 16);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
  static Floats load_bf16(const uint16_t* from) {
    return each([&](int i) { return widen(from[i]); });
  }
  static void store_bf16(uint16_t* to, Floats x) {
    for (int i = 0; i < 16; i++) to[i] = narrow(x.v[i]);
  }

  static constexpr bool kTakesPairsApart = false;
  static constexpr TileRows kBf16Rows = {2, 0, 0};
  using Bf16Input = float;
  struct Bf16Weights {
    Floats even, odd;
  };
  struct Bf16Pair {
    float even, odd;
  };
  static Bf16Weights load_pairs(const uint16_t* from) {
    return {each([&](int i) { return widen(from[2 * i]); }), each([&](int i) { return widen(from[2 * i + 1]); })};
  }
  static Bf16Pair broadcast_pair(const float* from) { return {from[0], from[1]}; }
  static Floats dot(Floats sum, Bf16Weights w, Bf16Pair x) {
    return each([&](int i) { return fused(w.odd.v[i], x.odd, fused(w.even.v[i], x.even, sum.v[i])); });
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
  static constexpr TileRows kFloatRows = {2, 0, 0};

  static constexpr bool kSumsBytesIn16Bits = false;
  static constexpr TileRows kInt8Rows = {2, 0, 0}, kInt4Rows = kInt8Rows;
  static Ints load_bytes(const uint8_t* from) {
    Ints result;
    memcpy(result.v, from, 64);
    return result;
  }
  static Ints broadcast_bytes(const int8_t* from) {
    int32_t four;
    memcpy(&four, from, 4);
    return set1_int(four);
  }
  static Ints low_nibbles(Ints x) {
    for (int i = 0; i < 16; i++) x.v[i] &= 0x0f0f0f0f;
    return x;
  }
  static Ints high_nibbles(Ints x) {
    for (int i = 0; i < 16; i++) x.v[i] = (x.v[i] >> 4) & 0x0f0f0f0f;
    return x;
  }
  static Ints set1_int(int32_t value) {
    Ints result;
    for (int i = 0; i < 16; i++) result.v[i] = value;
    return result;
  }
  static Ints dot_bytes(Ints sum, Ints w, Ints x) {
    const uint8_t* weights = (const uint8_t*)w.v;
    const int8_t* inputs = (const int8_t*)x.v;
    for (int i = 0; i < 16; i++)
      for (int j = 0; j < 4; j++) sum.v[i] += (int32_t)weights[4 * i + j] * inputs[4 * i + j];
    return sum;
  }
  static Floats to_floats(Ints x) {
    return each([&](int i) { return (float)x.v[i]; });
  }
  static Ints store_rounded_bytes(int8_t* to, Floats value) {
    Ints result;
    for (int i = 0; i < 16; i++) {
      const float rounded = nearbyintf(value.v[i]);
      result.v[i] = rounded > 127.0f ? 127 : rounded < -127.0f ? -127 : (int32_t)rounded;
      to[i] = (int8_t)result.v[i];
    }
    return result;
  }
  static int32_t sum_ints(Ints x) {
    int32_t total = 0;
    for (int i = 0; i < 16; i++) total += x.v[i];
    return total;
  }
  static Ints add_ints(Ints x, Ints y) {
    for (int i = 0; i < 16; i++) x.v[i] += y.v[i];
    return x;
  }

  static void prefetch(const void*) {}
  static void prefetch_later(const void*) {}
};

}  // namespace
