// The kernels for one instruction set. Nothing here may use the standard library's templates: the linker merges them with
// those of other files, and a processor without these instructions would then meet them.
#include "kernels.h"

#if defined(MOBULA_HAS_AMX)
#include <immintrin.h>

#include <stdint.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,f16c,bmi2"))), apply_to = function)
#elif defined(MOBULA_EMULATE_BF16)  // so that the compiler cannot use the instructions either
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,bmi2")
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,f16c,bmi2")
#endif
#define MOBULA_AVX512_BF16
#define MOBULA_AMX
#include "simd_avx512.h"
#include "table.h"

const KernelTable* amx_table() { return &kTable; }
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
