// Absorbed attention over the paged latent cache: keys are the latent rows, values their first kv_lora_rank numbers, both
// shared by all heads. For any number of rows, each with its own context.
//
// A row's context is cut into spans, whose length follows from the length of the context alone; a task takes one span
// with some heads, in blocks of tokens with an online softmax. The spans' results are then merged in ascending order.
// So a row's bits depend on its query and its context, not on other rows, on threads or on where its blocks lie.
//
// A block is staged once for all heads of a task, in slabs of 64 units a token, so that one product's operands stay in the
// first-level cache; AMX reads keys in place. Heads are lanes of the scores; columns of the latent are lanes of the output.
#pragma once

#include "mla_stage.h"

namespace {

constexpr int kMinSpan = 256, kMaxSpan = 2048, kSpansWanted = 8;  // tokens, tokens, of a row
constexpr int kMaxGroupsPerTask = 2;      // of heads: their queries and outputs stay in the second-level cache
constexpr size_t kPartBytes = 64 << 20;   // of spans' results in memory at once, or one row's


inline int span_tokens(int context_len) {
  int span = kMinSpan;
  while (span < kMaxSpan && span * kSpansWanted < context_len) span *= 2;
  return span;
}

// scores[token][head] of four tokens and four heads, both as rows of units; lanes are summed at the end. Needs the fewest
// loads a product where there are only 16 heads. The units of a token lie in slabs, `slab_stride` apart.
template <class U, class S>
inline void score_tile(const typename U::Unit* const* tokens, size_t slab_stride, const typename U::Unit* queries,
                       int query_stride, int units, float* scores, Fetch fetch) {
  typename S::Floats acc[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) acc[i] = S::zero();
  const typename U::Unit *t0 = tokens[0], *t1 = tokens[1], *t2 = tokens[2], *t3 = tokens[3];
  for (int first = 0; first < units; first += kSlab) {
    for (int i = 0; i < U::kNumbers; i++, fetch.first += 64, fetch.second += 64) {
      __builtin_prefetch(fetch.first, 0, 2);
      __builtin_prefetch(fetch.second, 0, 2);
    }
    const int last = units - first < kSlab ? units - first : kSlab;
    for (int i = 0; i < last; i += 16) {
      const typename U::Weights w0 = U::load(t0 + i), w1 = U::load(t1 + i), w2 = U::load(t2 + i), w3 = U::load(t3 + i);
#pragma GCC unroll 4
      for (int head = 0; head < 4; head++) {
        const typename U::Weights query = U::load(queries + head * query_stride + first + i);
        acc[head] = U::dot(acc[head], w0, query);
        acc[4 + head] = U::dot(acc[4 + head], w1, query);
        acc[8 + head] = U::dot(acc[8 + head], w2, query);
        acc[12 + head] = U::dot(acc[12 + head], w3, query);
      }
    }
    t0 += slab_stride;
    t1 += slab_stride;
    t2 += slab_stride;
    t3 += slab_stride;
  }
  alignas(64) float sums[16];
  S::store(sums, S::sum_each(acc));
  for (int token = 0; token < 4; token++) memcpy(scores + token * 16, sums + 4 * token, 16);
}

struct Span {
  int row, start, end;  // positions
};

// What a task computes, and where it leaves it; lanes of all groups of heads.
struct SpanOfHeads : Span {
  int first_group, last_group;
  float *maximum, *denominator, *out;
};

struct DecodeWork {
  const MlaDecodeCall* call;
  const Span* spans;
  const int* starts;  // of each row of the wave, its first span; one more at the end
  int first_row, num_groups, groups_per_task, lanes;
  int units;          // of a latent row
  int width;          // of an output row in `parts`: kv_lora_rank, padded
  int query_stride;   // units of a query, padded
  uint32_t* queries;  // [rows of the wave][num_groups][units][lanes], or [lanes][query_stride] for score_tile
  float* parts;       // [spans][num_groups * lanes][width]
  float* stats;       // [spans][2][num_groups * lanes]: maximum, denominator
};

inline LatentRows latent_rows(const MlaDecodeCall& call, int row) {
  const int sequence = call.sequences ? call.sequences[row] : row;
  return {call.cache, call.block_tables + (size_t)sequence * call.max_num_blocks, call.cache_row_stride, call.block_size,
          call.cache_format};
}

template <class U>
void pack_queries_task(void* context, int task, int thread) {
  const DecodeWork& work = *(const DecodeWork*)context;
  const MlaDecodeCall& call = *work.call;
  const int row = task / work.num_groups, group = task % work.num_groups;
  const int lanes = work.lanes, unit_format = U::kNumbers == 2 ? kBfloat16 : kFloat32;
  uint32_t* to = work.queries + (size_t)task * work.query_stride * lanes;
  const bool is_direct = kIsWide && lanes == 16 && !U::kUsesAmx;
  uint32_t* buffer = is_direct ? to : (uint32_t*)thread_scratch(thread, (size_t)lanes * work.units * 4);
  const int stride = is_direct ? work.query_stride : work.units;
  for (int lane = 0; lane < lanes; lane++) {
    const int head = group * lanes + lane;
    uint32_t* row_of_buffer = buffer + (size_t)lane * stride;
    if (is_direct || head >= call.num_heads) memset(row_of_buffer, 0, (size_t)stride * 4);
    if (head >= call.num_heads) continue;
    const size_t from = work.first_row + row;
    convert_row(call.query, call.query_format, from * call.query_row_stride + head * call.query_head_stride, row_of_buffer,
                unit_format, 0, call.kv_lora_rank);
    convert_row(call.query_rope, call.query_format, from * call.rope_row_stride + head * call.rope_head_stride,
                row_of_buffer, unit_format, call.kv_lora_rank, call.rope_dim);
  }
  if (buffer != to) transpose(buffer, work.units, lanes, work.units, to, lanes);
}

// Scores to weights, in place for floats, to pairs of tokens else; scale includes log2(e). Lanes are heads. maximum, denominator, decay: [lanes].
template <class U, int V>
inline void softmax_block(float* scores, uint32_t* weights, int n, float scale, float* maximum, float* denominator,
                          float* decay) {
  constexpr int kLanes = 16 * V;
  for (int j = 0; j < V; j++) {
    float* column = scores + 16 * j;
    Simd::Floats largest = Simd::load(column);
    for (int t = 1; t < n; t++) largest = Simd::max(largest, Simd::load(column + t * kLanes));
    const Simd::Floats factor = Simd::set1(scale), before = Simd::load(maximum + 16 * j);
    const Simd::Floats now = Simd::max(before, Simd::mul(largest, factor));
    const Simd::Floats shift = Simd::sub(Simd::zero(), now);
    const Simd::Floats fading = power_of_two(Simd::sub(before, now));
    Simd::Floats sum = Simd::zero();
    if constexpr (U::kNumbers == 1) {
      for (int t = 0; t < n; t++) {
        const Simd::Floats weight = power_of_two(Simd::fma(Simd::load(column + t * kLanes), factor, shift));
        Simd::store(column + t * kLanes, weight);
        sum = Simd::add(sum, weight);
      }
    } else {
      for (int t = 0; t < n; t += 2) {
        const Simd::Floats even = power_of_two(Simd::fma(Simd::load(column + t * kLanes), factor, shift));
        Simd::Floats odd = Simd::zero();
        if (t + 1 < n) odd = power_of_two(Simd::fma(Simd::load(column + (t + 1) * kLanes), factor, shift));
        store_pairs<Simd>(weights + t / 2 * kLanes + 16 * j, even, odd);
        sum = Simd::add(Simd::add(sum, even), odd);
      }
    }
    Simd::store(denominator + 16 * j, Simd::fma(Simd::load(denominator + 16 * j), fading, sum));
    Simd::store(maximum + 16 * j, now);
    Simd::store(decay + 16 * j, fading);
  }
}

}  // namespace

#ifdef MOBULA_AMX
#include "amx_decode.h"
#endif

namespace {

template <class U, int V>
void attend_span(const DecodeWork& work, const SpanOfHeads& span, int thread) {
  const MlaDecodeCall& call = *work.call;
  using Unit = typename U::Unit;
  constexpr int kLanes = 16 * V, kScoreRows = kIsWide ? 16 / V : 4, kOutRows = 4, kOutVectors = kIsWide ? 4 : 1;
  const LatentRows rows = latent_rows(call, span.row);

  Stage<U> stage;
  stage.num_key_slabs = (work.units + kSlab - 1) / kSlab;
  stage.num_value_slabs = (call.kv_lora_rank + kSlab - 1) / kSlab;
  const size_t value_units = U::kNumbers == 2 ? (size_t)stage.num_value_slabs * kSlabUnits / 2 : 0;
  stage.keys = (Unit*)thread_scratch(thread, ((size_t)stage.num_key_slabs * kSlabUnits + value_units) * 4);
  stage.values = U::kNumbers == 2 ? stage.keys + (size_t)stage.num_key_slabs * kSlabUnits : stage.keys;
  constexpr bool kDotsRows = kIsWide && V == 1;
  const bool is_in_place = U::kNumbers == 2 && work.units % 16 == 0;
  constexpr int kValueSlab = kSlabUnits / U::kNumbers;
  stage.latent_dim = call.kv_lora_rank + call.rope_dim;
  stage.format = call.cache_format;
  const int room = 2 * U::kNumbers * stage.num_key_slabs;  // lines that one score_tile asks for
  const int row_lines = (int)((stage.latent_dim * element_bytes(stage.format) + 63) / 64);

  alignas(64) float scores[kBlockTokens * kLanes];
  alignas(64) uint32_t pairs[kBlockTokens / 2 * kLanes];
  alignas(64) float decay[kLanes];
  for (int start = span.start; start < span.end; start += kBlockTokens) {
    stage.open(rows, start, span.end);
    const int n = stage.num_tokens;
    const bool is_first = start == span.start;
    const int next_end = start + 2 * kBlockTokens < span.end ? start + 2 * kBlockTokens : span.end;
    const char* here = (const char*)stage.tokens[0];
    Fetcher fetcher = {&rows, start + kBlockTokens, next_end, U::kNumbers == 2, row_lines, {here, here}};
    for (int group = span.first_group; group < span.last_group; group++) {
      const Unit* queries = (const Unit*)work.queries +
                            ((size_t)(span.row - work.first_row) * work.num_groups + group) * work.query_stride * kLanes;
      if constexpr (kDotsRows) {
        if (group == span.first_group && !is_in_place)
          for (int slab = 0; slab < stage.num_key_slabs; slab++) stage.fill_keys(slab);
        for (int token = 0; token < n; token += 4) {
          const Unit* four[4];
          for (int i = 0; i < 4; i++) {  // behind the last token, that token again
            const int at = token + i < n ? token + i : n - 1;
            four[i] = is_in_place ? (const Unit*)stage.tokens[at] : stage.keys + at * kSlab;
          }
          for (int head = 0; head < 16; head += 4)
            score_tile<U, Simd>(four, is_in_place ? kSlab : kSlabUnits, queries + (size_t)head * work.query_stride,
                                work.query_stride, work.units, scores + token * 16 + head,
                                head % 8 ? fetcher.take(room) : fetcher.last);
        }
      } else {
        for (int slab = 0; slab < stage.num_key_slabs; slab++) {
          if (group == span.first_group) stage.fill_keys(slab);
          const int k = work.units - slab * kSlab < kSlab ? work.units - slab * kSlab : kSlab;
          const Unit* keys = stage.keys + (size_t)slab * kSlabUnits;
          for (int token = 0; token < n; token += kScoreRows)
            accumulate<U, kScoreRows, V, kSlab, 1, kLanes>(keys + token * kSlab, queries + (size_t)slab * kSlab * kLanes, k,
                                                           scores + token * kLanes, kLanes, slab == 0, nullptr,
                                                           fetcher.take(2 * k / kInputsPerFetch));
        }
      }
      softmax_block<U, V>(scores, pairs, n, call.scale * kLog2E, span.maximum + group * kLanes,
                          span.denominator + group * kLanes, decay);
      const Unit* weights = U::kNumbers == 2 ? (const Unit*)pairs : (const Unit*)scores;
      const int k = (n + U::kNumbers - 1) / U::kNumbers;
      for (int slab = 0; slab < stage.num_value_slabs; slab++) {
        if (U::kNumbers == 2 && group == span.first_group) stage.fill_values(slab);
        const Unit* values = stage.values + (size_t)slab * kValueSlab;
        const int columns = work.width - slab * kSlab < kSlab ? work.width - slab * kSlab : kSlab;
        for (int lane = 0; lane < kLanes; lane += kOutRows)
          for (int column = 0; column < columns; column += 16 * kOutVectors)
            accumulate<U, kOutRows, kOutVectors, 1, kLanes, kSlab>(
                weights + lane, values + column, k,
                span.out + (size_t)(group * kLanes + lane) * work.width + slab * kSlab + column, work.width, is_first,
                decay + lane, fetcher.take(2 * k / kInputsPerFetch));
      }
    }
  }
}

template <class U, int V>
void span_task(void* context, int task, int thread) {
  const DecodeWork& work = *(const DecodeWork*)context;
  const int lanes = work.num_groups * work.lanes, chunks = (work.num_groups + work.groups_per_task - 1) / work.groups_per_task;
  const int index = task / chunks, first = task % chunks * work.groups_per_task;
  float* stats = work.stats + (size_t)index * 2 * lanes;
  SpanOfHeads span = {work.spans[index], first, first + work.groups_per_task, stats, stats + lanes,
                      work.parts + (size_t)index * lanes * work.width};
  if (span.last_group > work.num_groups) span.last_group = work.num_groups;
  for (int lane = span.first_group * work.lanes; lane < span.last_group * work.lanes; lane++) {
    span.maximum[lane] = -3.4e38f;
    span.denominator[lane] = 0.0f;
  }
#ifdef MOBULA_AMX
  if constexpr (U::kUsesAmx) return amx_span<U, V>(work, span, thread);
#endif
  attend_span<U, V>(work, span, thread);
}

// Spans of one row and 16 heads, in ascending order.
inline void merge_task(void* context, int task, int) {
  const DecodeWork& work = *(const DecodeWork*)context;
  const MlaDecodeCall& call = *work.call;
  const int padded_heads = work.num_groups * work.lanes, sixteens = padded_heads / 16;
  const int row = task / sixteens, first_head = task % sixteens * 16;
  const int first = work.starts[row], last = work.starts[row + 1];
  const size_t stats_stride = 2 * (size_t)padded_heads;
  float* stats = work.stats + first_head;
  Simd::Floats largest = Simd::set1(-3.4e38f), total = Simd::zero();
  for (int i = first; i < last; i++) largest = Simd::max(largest, Simd::load(stats + i * stats_stride));
  for (int i = first; i < last; i++) {  // the maximum gives way to the part's weight
    const Simd::Floats weight = power_of_two(Simd::sub(Simd::load(stats + i * stats_stride), largest));
    Simd::store(stats + i * stats_stride, weight);
    total = Simd::fma(weight, Simd::load(stats + i * stats_stride + padded_heads), total);
  }
  alignas(64) float inverse[16];
  Simd::store(inverse, Simd::div(Simd::set1(1.0f), total));
  for (int lane = 0; lane < 16 && first_head + lane < call.num_heads; lane++) {
    const int head = first_head + lane;
    const size_t to = (size_t)(work.first_row + row) * call.out_row_stride + (size_t)head * call.out_head_stride;
    const Simd::Floats factor = Simd::set1(first == last ? 0.0f : inverse[lane]);
    for (int column = 0; column < call.kv_lora_rank; column += 16) {
      Simd::Floats sum = Simd::zero();
      for (int i = first; i < last; i++)
        sum = Simd::fma(Simd::set1(stats[i * stats_stride + lane]),
                        Simd::load(work.parts + ((size_t)i * padded_heads + head) * work.width + column), sum);
      sum = Simd::mul(sum, factor);
      const int left = call.kv_lora_rank - column;
      if (left >= 16)
        store_as(call.out, call.query_format, to + column, sum);
      else
        store_tail(call.out, call.query_format, to + column, sum, left);
    }
  }
}

template <class U, int V>
void decode_wave(DecodeWork& work, int num_rows, int num_spans) {
  parallel_for(num_rows * work.num_groups, pack_queries_task<U>, &work);
  work.groups_per_task = kMaxGroupsPerTask;
  if (num_spans * ((work.num_groups + kMaxGroupsPerTask - 1) / kMaxGroupsPerTask) < 4 * num_threads()) work.groups_per_task = 1;
  const int chunks = (work.num_groups + work.groups_per_task - 1) / work.groups_per_task;
  parallel_for(num_spans * chunks, span_task<U, V>, &work);
  parallel_for(num_rows * (work.num_groups * V), merge_task, &work);
}

template <class U, int V>
void decode_as(const MlaDecodeCall& call) {
  DecodeWork work = {};
  work.call = &call;
  work.lanes = 16 * V;
  work.num_groups = (call.num_heads + work.lanes - 1) / work.lanes;
  work.units = (call.kv_lora_rank + call.rope_dim) / U::kNumbers;
  work.query_stride = round_up(work.units, 16);
  work.width = round_up(call.kv_lora_rank, 64);
  const size_t padded_heads = (size_t)work.num_groups * work.lanes;
  const size_t part_bytes = padded_heads * (work.width + 2) * 4;
  for (int first = 0; first < call.num_rows;) {
    int last = first, num_spans = 0;
    do {
      const int length = call.context_lens[last], span = span_tokens(length);
      const int more = (length + span - 1) / span;
      if (last > first && (size_t)(num_spans + more) * part_bytes > kPartBytes) break;
      num_spans += more;
      last++;
    } while (last < call.num_rows);
    const size_t query_bytes = (size_t)work.query_stride * 4 * padded_heads * (last - first);
    const size_t index_bytes = round_up((int)(sizeof(Span) * num_spans + sizeof(int) * (last - first + 1)), 64);
    uint8_t* memory = (uint8_t*)scratch(kMlaSlot, query_bytes + index_bytes + num_spans * part_bytes);
    work.queries = (uint32_t*)memory;
    Span* spans = (Span*)(memory + query_bytes);
    int* starts = (int*)(spans + num_spans);
    work.parts = (float*)(memory + query_bytes + index_bytes);
    work.stats = work.parts + num_spans * padded_heads * work.width;
    work.spans = spans;
    work.starts = starts;
    work.first_row = first;
    int count = 0;
    for (int row = first; row < last; row++) {
      starts[row - first] = count;
      const int length = call.context_lens[row], span = span_tokens(length);
      for (int start = 0; start < length; start += span)
        spans[count++] = {row, start, start + span < length ? start + span : length};
    }
    starts[last - first] = count;
    decode_wave<U, V>(work, last - first, num_spans);
    first = last;
  }
}

template <class S>
void decode_any(const MlaDecodeCall& call) {
  const bool is_wide = kIsWide && call.num_heads > 16;
  if constexpr (sizeof(typename S::Bf16Input) == 2)
    if (call.query_format == kBfloat16 && call.cache_format == kBfloat16 && call.kv_lora_rank % 2 == 0 &&
        call.rope_dim % 2 == 0) {
#ifdef MOBULA_AMX
      if ((call.kv_lora_rank + call.rope_dim) % 32 == 0 && call.block_size % kTileRows == 0)
        return is_wide ? decode_as<AmxUnits<S>, 2>(call) : decode_as<AmxUnits<S>, 1>(call);
#endif
      return is_wide ? decode_as<PairUnits<S>, 2>(call) : decode_as<PairUnits<S>, 1>(call);
    }
  return is_wide ? decode_as<FloatUnits, 2>(call) : decode_as<FloatUnits, 1>(call);
}

void mla_decode(const MlaDecodeCall* call) { decode_any<Simd>(*call); }

}  // namespace
