// AMX: eight registers of 16 rows of 64 bytes, and products of whole ones. With
// MOBULA_EMULATE_AMX (see the Makefile) they are memory and loops, to the bit what the processor computes, for tests.
#pragma once

#include <stdint.h>
#include <string.h>

namespace {

constexpr int kTileRows = 16, kTileBytes = 64;  // of a register; the bytes are of a row

// How many rows the registers have: the last one, of weights, all 16, the others as many as there are to multiply, up to 16.
// Every thread has registers of its own, which are given back so that switching threads stays cheap.
struct alignas(64) AmxShape {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
  explicit AmxShape(int num_rows) {
    for (int i = 0; i < 8; i++) {
      row_bytes[i] = kTileBytes;
      rows[i] = (uint8_t)(i == 7 ? kTileRows : num_rows);
    }
  }
};

#ifdef MOBULA_EMULATE_AMX

struct AmxRegisters {
  AmxShape shape{kTileRows};
  alignas(64) uint8_t tiles[8][kTileRows][kTileBytes];
};
inline AmxRegisters& amx_registers() {
  static thread_local AmxRegisters registers;
  return registers;
}

// Products of bfloat16 take and leave no subnormal numbers, whatever the processor is told otherwise.
inline float without_subnormals(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if (!(bits & 0x7f800000u)) bits &= 0x80000000u;
  memcpy(&value, &bits, 4);
  return value;
}
inline float float_of_bf16(uint16_t number) {
  const uint32_t bits = (uint32_t)number << 16;
  float value;
  memcpy(&value, &bits, 4);
  return without_subnormals(value);
}

struct Amx {
  explicit Amx(const AmxShape& shape) {
    amx_registers().shape = shape;
    memset(amx_registers().tiles, 0, sizeof amx_registers().tiles);
  }
  template <int N>
  static void zero() {
    memset(amx_registers().tiles[N], 0, sizeof amx_registers().tiles[N]);
  }
  template <int N>
  static void load(const void* from, size_t stride) {
    for (int i = 0; i < amx_registers().shape.rows[N]; i++)
      memcpy(amx_registers().tiles[N][i], (const uint8_t*)from + i * stride, kTileBytes);
  }
  template <int N>
  static void store(void* to, size_t stride) {
    for (int i = 0; i < amx_registers().shape.rows[N]; i++)
      memcpy((uint8_t*)to + i * stride, amx_registers().tiles[N][i], kTileBytes);
  }
  template <int kSum, int kX, int kW>
  static void dot_bf16() {
    AmxRegisters& r = amx_registers();
    for (int m = 0; m < r.shape.rows[kSum]; m++) {
      const uint16_t* x = (const uint16_t*)r.tiles[kX][m];
      float* sums = (float*)r.tiles[kSum][m];
      for (int n = 0; n < 16; n++) {
        float even = 0.0f, odd = 0.0f;
        for (int k = 0; k < 16; k++) {
          const uint16_t* w = (const uint16_t*)r.tiles[kW][k] + 2 * n;
          even = without_subnormals(__builtin_fmaf(float_of_bf16(x[2 * k]), float_of_bf16(w[0]), even));
          odd = without_subnormals(__builtin_fmaf(float_of_bf16(x[2 * k + 1]), float_of_bf16(w[1]), odd));
        }
        sums[n] = without_subnormals(without_subnormals(sums[n]) + without_subnormals(even + odd));
      }
    }
  }
  template <int kSum, int kX, int kW>
  static void dot_bytes() {
    AmxRegisters& r = amx_registers();
    for (int m = 0; m < r.shape.rows[kSum]; m++)
      for (int n = 0; n < 16; n++)
        for (int k = 0; k < 16; k++)
          for (int i = 0; i < 4; i++)
            ((int32_t*)r.tiles[kSum][m])[n] += (int8_t)r.tiles[kX][m][4 * k + i] * r.tiles[kW][k][4 * n + i];
  }
};

#else

// As assembly: the intrinsics are macros that take no template's number.
struct Amx {
  explicit Amx(const AmxShape& shape) { __asm__ volatile("ldtilecfg %0" : : "m"(shape)); }
  ~Amx() { __asm__ volatile("tilerelease"); }
  Amx(const Amx&) = delete;
  template <int N>
  static void zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(N));
  }
  template <int N>
  static void load(const void* from, size_t stride) {
    __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(N), "r"(from), "r"(stride) : "memory");
  }
  template <int N>
  static void store(void* to, size_t stride) {
    __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(N), "r"(to), "r"(stride) : "memory");
  }
  // kSum += kX * kW: pairs of bfloat16.
  template <int kSum, int kX, int kW>
  static void dot_bf16() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kX), "i"(kW));
  }
  // Fours of signed times unsigned bytes.
  template <int kSum, int kX, int kW>
  static void dot_bytes() {
    __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kX), "i"(kW));
  }
};

#endif

inline void amx_zero() {
  Amx::zero<0>();
  Amx::zero<1>();
  Amx::zero<2>();
  Amx::zero<3>();
  Amx::zero<4>();
  Amx::zero<5>();
}

// The sums of up to three blocks of rows and 32 columns, four bytes each. stride: numbers from one row to the next.
template <int kBlocks, class Number>
inline void amx_store(Number* to, size_t stride) {
  Amx::store<0>(to, stride * 4);
  Amx::store<1>(to + 16, stride * 4);
  if constexpr (kBlocks > 1) {
    Amx::store<2>(to + kTileRows * stride, stride * 4);
    Amx::store<3>(to + kTileRows * stride + 16, stride * 4);
  }
  if constexpr (kBlocks > 2) {
    Amx::store<4>(to + 2 * kTileRows * stride, stride * 4);
    Amx::store<5>(to + 2 * kTileRows * stride + 16, stride * 4);
  }
}

// The same into the registers.
template <int kBlocks>
inline void amx_load(const float* from, size_t stride) {
  Amx::load<0>(from, stride * 4);
  Amx::load<1>(from + 16, stride * 4);
  if constexpr (kBlocks > 1) {
    Amx::load<2>(from + kTileRows * stride, stride * 4);
    Amx::load<3>(from + kTileRows * stride + 16, stride * 4);
  }
  if constexpr (kBlocks > 2) {
    Amx::load<4>(from + 2 * kTileRows * stride, stride * 4);
    Amx::load<5>(from + 2 * kTileRows * stride + 16, stride * 4);
  }
}

}  // namespace
