// The kernels for one instruction set. Nothing here may use the standard library's templates: the linker merges them with
// those of other files, and a processor without these instructions would then meet them.
#if defined(__x86_64__)
#include <immintrin.h>

#include <stdint.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi2")
#endif
#include "simd_avx2.h"
#include "table.h"

const KernelTable* avx2_table() { return &kTable; }
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
