// What happens to a step's rows before attention: the latent is normed, keys and queries are rotated, the latent row goes
// to the cache. One task a row.
#pragma once

#include "mla_units.h"

namespace {

constexpr int kRopePiece = 128;  // numbers rotated at once

// Pairs (x0, x1), (x2, x3), ... by their angles, in fp32, products and sums rounded one by one.
inline void rotate(const void* x, int format, size_t at, const float* cos, const float* sin, int n, void* out,
                   int out_format, size_t out_at) {
  alignas(64) float from[kRopePiece], to[kRopePiece];
  for (int first = 0; first < n; first += kRopePiece) {
    const int count = n - first < kRopePiece ? n - first : kRopePiece;
    convert_row(x, format, at + first, from, kFloat32, 0, count);
    const float *c = cos + first / 2, *s = sin + first / 2;
    for (int i = 0; i < count / 2; i++) {
      to[2 * i] = from[2 * i] * c[i] - from[2 * i + 1] * s[i];
      to[2 * i + 1] = from[2 * i] * s[i] + from[2 * i + 1] * c[i];
    }
    if (format == kBfloat16 && out_format == kFloat32) {  // a value of the activations, wherever it is kept
      alignas(64) uint16_t rounded[kRopePiece];
      convert_row(to, kFloat32, 0, rounded, kBfloat16, 0, count);
      convert_row(rounded, kBfloat16, 0, out, out_format, out_at + first, count);
    } else {
      convert_row(to, kFloat32, 0, out, out_format, out_at + first, count);
    }
  }
}

struct PrepareWork {
  const MlaPrepareCall* call;
};

inline void prepare_task(void* context, int row, int thread) {
  const MlaPrepareCall& call = *((const PrepareWork*)context)->call;
  const float* cos = call.cos + (size_t)row * (call.rope_dim / 2);
  const float* sin = call.sin + (size_t)row * (call.rope_dim / 2);
  const size_t slot = (size_t)call.slot_mapping[row] * call.cache_row_stride;
  const int rank = call.kv_lora_rank;
  // norm_task writes in the activations' format
  const bool is_direct = call.format == call.cache_format;
  void* normed = is_direct ? (uint8_t*)call.cache + slot * element_bytes(call.cache_format)
                           : thread_scratch(thread, (size_t)rank * element_bytes(call.format));
  NormCall norm = {(const uint8_t*)call.kv + (size_t)row * call.kv_row_stride * element_bytes(call.format),
                   call.norm, normed, 0, 0, 1, rank, call.format, call.eps};
  norm_task(&norm, 0, thread);
  if (!is_direct) convert_row(normed, call.format, 0, call.cache, call.cache_format, slot, rank);
  rotate(call.kv, call.format, (size_t)row * call.kv_row_stride + rank, cos, sin, call.rope_dim, call.cache,
         call.cache_format, slot + rank);
  for (int head = 0; head < call.num_heads; head++) {
    const size_t at = (size_t)row * call.query_row_stride + (size_t)head * call.query_head_stride + call.qk_nope_dim;
    rotate(call.query, call.format, at, cos, sin, call.rope_dim, call.query, call.format, at);
  }
}

void mla_prepare(const MlaPrepareCall* call) {
  PrepareWork work = {call};
  over_rows(call->num_rows, call->kv_lora_rank + call->rope_dim * (call->num_heads + 1), prepare_task, &work);
}

}  // namespace
