// A span of absorbed attention by AMX: tokens are read in place as rows of scores, heads are rows of the output. Included by
// mla_decode.h.
#pragma once

namespace {

// A line of each of 16 tokens.
inline void amx_fetch_column(const uint8_t* tokens, size_t row_bytes, int unit) {
  if (!tokens) return;
  for (int token = 0; token < kTileRows; token++) Simd::prefetch_later(tokens + token * row_bytes + unit * 4);
}

// scores [16 or 32 tokens][16 * V heads]. Tokens: rows row_bytes apart, the second 16 at `second`; queries: [units][16 * V].
// Meanwhile the lines of 16 tokens each from `next` and `next_second` on are asked for, those that are not null.
template <int V, bool kHasSecond>
inline void amx_scores(const uint8_t* first, const uint8_t* second, size_t row_bytes, const uint32_t* queries, int units,
                       float* scores, const uint8_t* next, const uint8_t* next_second) {
  constexpr int kLanes = 16 * V;
  amx_zero();
  for (int unit = 0; unit < units; unit += kStepUnits, queries += kStepUnits * kLanes) {
    Amx::load<6>(queries, kLanes * 4);
    if (V == 2) Amx::load<7>(queries + 16, kLanes * 4);
    Amx::load<4>(first + unit * 4, row_bytes);
    Amx::dot_bf16<0, 4, 6>();
    if (V == 2) Amx::dot_bf16<1, 4, 7>();
    amx_fetch_column(next, row_bytes, unit);
    if (!kHasSecond) continue;
    amx_fetch_column(next_second, row_bytes, unit);
    Amx::load<5>(second + unit * 4, row_bytes);
    Amx::dot_bf16<2, 5, 6>();
    if (V == 2) Amx::dot_bf16<3, 5, 7>();
  }
  Amx::store<0>(scores, kLanes * 4);
  if (V == 2) Amx::store<1>(scores + 16, kLanes * 4);
  if (!kHasSecond) return;
  Amx::store<2>(scores + kTileRows * kLanes, kLanes * 4);
  if (V == 2) Amx::store<3>(scores + kTileRows * kLanes + 16, kLanes * 4);
}

// Output rows of `lanes` heads times their decay; most often none has any.
inline void amx_decay(float* out, int lanes, int width, const float* decay) {
  for (int lane = 0; lane < lanes; lane++) {
    if (decay[lane] == 1.0f) continue;
    const Simd::Floats factor = Simd::set1(decay[lane]);
    float* row = out + (size_t)lane * width;
    for (int i = 0; i < width; i += 16) Simd::store(row + i, Simd::mul(Simd::load(row + i), factor));
  }
}

template <class U, int V>
void amx_span(const DecodeWork& work, const SpanOfHeads& span, int thread) {
  constexpr int kLanes = 16 * V, kPairs = kBlockTokens / 2, kValueSlab = kSlabUnits / 2;
  const MlaDecodeCall& call = *work.call;
  const LatentRows rows = latent_rows(call, span.row);
  const size_t row_bytes = (size_t)call.cache_row_stride * 2;
  Stage<U> stage;
  stage.num_value_slabs = (call.kv_lora_rank + kSlab - 1) / kSlab;
  stage.latent_dim = call.kv_lora_rank + call.rope_dim;
  stage.format = call.cache_format;
  stage.values = (uint32_t*)thread_scratch(thread, (size_t)stage.num_value_slabs * kValueSlab * 4);
  alignas(64) float scores[kBlockTokens * kLanes];
  alignas(64) uint32_t pairs[kPairs * kLanes];
  alignas(64) uint32_t weights[kLanes * kPairs];
  alignas(64) float decay[kLanes];
  const ProductScope<U> scope;
  for (int start = span.start; start < span.end; start += kBlockTokens) {
    stage.open(rows, start, span.end);
    const int n = stage.num_tokens, used = (n + 1) / 2, padded = round_up(used, kStepUnits);
    const auto sixteen = [&](int position) { return position < span.end ? (const uint8_t*)rows.at(position) : nullptr; };
    for (int group = span.first_group; group < span.last_group; group++) {
      const uint32_t* queries = work.queries + ((size_t)(span.row - work.first_row) * work.num_groups + group) *
                                                   work.query_stride * kLanes;
      const bool is_first_group = group == span.first_group;
      for (int token = 0; token < n; token += 2 * kTileRows) {
        const uint8_t *first = sixteen(start + token), *second = sixteen(start + token + kTileRows);
        const int next = start + kBlockTokens + token;
        const uint8_t* later = is_first_group ? sixteen(next) : nullptr;
        const uint8_t* later_second = is_first_group ? sixteen(next + kTileRows) : nullptr;
        if (second)
          amx_scores<V, true>(first, second, row_bytes, queries, work.units, scores + token * kLanes, later, later_second);
        else
          amx_scores<V, false>(first, first, row_bytes, queries, work.units, scores + token * kLanes, later, later_second);
      }
      softmax_block<U, V>(scores, pairs, n, call.scale * kLog2E, span.maximum + group * kLanes,
                          span.denominator + group * kLanes, decay);
      if (padded > used) memset(pairs + used * kLanes, 0, (size_t)(padded - used) * kLanes * 4);
      transpose(pairs, kLanes, padded, kLanes, weights, kPairs);
      float* out = span.out + (size_t)group * kLanes * work.width;
      if (start > span.start) amx_decay(out, kLanes, work.width, decay);
      for (int slab = 0; slab < stage.num_value_slabs; slab++) {
        uint32_t* values = stage.values + (size_t)slab * kValueSlab;
        if (is_first_group) {
          stage.fill_values(slab);
          if (padded > used) memset(values + used * kSlab, 0, (size_t)(padded - used) * kSlab * 4);
        }
        amx_multiply_rows(kLanes, weights, kPairs, kSlab, values, padded, out + slab * kSlab, work.width, start == span.start);
      }
    }
  }
}

}  // namespace
