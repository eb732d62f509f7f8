// What happens to rows between products: exp, SiLU, RMS norm.
#pragma once

#include "rows.h"

namespace {

// To about 2 units in the last place between -87 and 88, flushed to 0 below; Cody-Waite reduction, polynomial of degree 6.
inline Simd::Floats exponential(Simd::Floats x) {
  x = Simd::min(Simd::max(x, Simd::set1(-87.0f)), Simd::set1(88.0f));
  const Simd::Floats n = Simd::round(Simd::mul(x, Simd::set1(1.44269504f)));
  Simd::Floats r = Simd::fma(n, Simd::set1(-0.693359375f), x);
  r = Simd::fma(n, Simd::set1(2.12194440e-4f), r);
  Simd::Floats p = Simd::set1(1.9875691500e-4f);
  p = Simd::fma(p, r, Simd::set1(1.3981999507e-3f));
  p = Simd::fma(p, r, Simd::set1(8.3334519073e-3f));
  p = Simd::fma(p, r, Simd::set1(4.1665795894e-2f));
  p = Simd::fma(p, r, Simd::set1(1.6666665459e-1f));
  p = Simd::fma(p, r, Simd::set1(5.0000001201e-1f));
  p = Simd::add(Simd::fma(Simd::mul(p, r), r, r), Simd::set1(1.0f));
  return Simd::scale_by_power(p, n);
}

// silu(gate) * up
inline Simd::Floats swiglu(Simd::Floats gate, Simd::Floats up) {
  const Simd::Floats e = exponential(Simd::sub(Simd::zero(), gate));
  return Simd::mul(Simd::div(gate, Simd::add(Simd::set1(1.0f), e)), up);
}

inline void norm_task(void* context, int row, int) {
  const NormCall& call = *(const NormCall*)context;
  const size_t at = row * call.x_stride, to = row * call.out_stride;
  const int n = call.num_columns, whole = n / 16 * 16;
  Simd::Floats squares = Simd::zero();
  for (int i = 0; i < whole; i += 16) {
    const Simd::Floats x = load_as_floats(call.x, call.format, at + i);
    squares = Simd::fma(x, x, squares);
  }
  if (whole < n) {
    const Simd::Floats x = load_tail(call.x, call.format, at + whole, n - whole);
    squares = Simd::fma(x, x, squares);
  }
  const Simd::Floats scale = Simd::set1(1.0f / __builtin_sqrtf(Simd::sum(squares) / n + call.eps));
  for (int i = 0; i < n; i += 16) {
    const int count = n - i < 16 ? n - i : 16;
    Simd::Floats x = count == 16 ? load_as_floats(call.x, call.format, at + i) : load_tail(call.x, call.format, at + i, count);
    const Simd::Floats w =
        count == 16 ? load_as_floats(call.weight, call.format, i) : load_tail(call.weight, call.format, i, count);
    x = Simd::mul(x, scale);
    if (call.format == kBfloat16) {  // the published models round between norm and weight
      alignas(64) uint16_t rounded[16];
      Simd::store_bf16(rounded, x);
      x = Simd::load_bf16(rounded);
    }
    x = Simd::mul(x, w);
    if (count == 16)
      store_as(call.out, call.format, to + i, x);
    else
      store_tail(call.out, call.format, to + i, x, count);
  }
}

void rms_norm(const NormCall* call) { over_rows(call->num_rows, call->num_columns, norm_task, (void*)call); }

}  // namespace
