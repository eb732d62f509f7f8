// The kernels for every other processor.
#include "simd_portable.h"
#include "experts.h"
#include "mla.h"

const KernelTable* portable_table() {
  static const KernelTable table = {linear, heads, experts, rms_norm, mla_prepare, mla_decode, mla_prefill, peak, read_through};
  return &table;
}
