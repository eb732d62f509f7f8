// Causal attention of one sequence's prompt rows in the naive form: keys and values are expanded from the latents head by
// head, then flash attention (arXiv 2205.14135) runs over them.
//
// The context is taken in pieces of 1024 tokens, and in tiles of 128 keys within them, both at fixed positions. A few heads
// at a time: their keys and values of one piece are expanded, then every (head, block of rows) attends to them. A row sees
// a tile's keys up to its own position, and skips tiles behind it. So a row's bits depend on its query and on the tokens up
// to its position, not on how a prompt is cut, on other rows or on threads. Memory: a piece's keys and values, and the fp32
// output, of as many heads as are taken at a time.
//
// Where the instruction set multiplies bfloat16 pairs, and everything is bfloat16, keys, values and weights are rounded to
// it; elsewhere all is float32, also between bfloat16 activations.
#pragma once

#include "linear.h"
#include "mla_units.h"

namespace {

constexpr int kPieceTokens = 1024;    // of context, expanded at once
constexpr int kKeysPerTile = 128;     // between two steps of the online softmax
constexpr int kExpandTokens = 512;    // a task; even, so that pairs of tokens stay together
constexpr int kTilePanels = kKeysPerTile / kPanelColumns;
constexpr float kLowest = -3.4e38f;

// A tile's values: panels of kKeysPerTile inputs, of which a product may read only the first.
template <class T>
struct ValueTiles {
  using Row = typename T::Row;
  static constexpr int kRows = T::kRows;
  template <int M, int V, int kPrefetch>
  static void run(const Row* x, const Panels& p, int half, float* out) {
    const size_t panel = kKeysPerTile * kPanelColumns;
    if constexpr (kHasPairs && sizeof(*x[0]) == 2) {
      const uint16_t* data = (const uint16_t*)p.matrix->data;
      tile_bf16<M, V, kPrefetch>(x, data + p.first * panel, data + p.second * panel, half, p.matrix->num_inputs, Ahead<kPrefetch>(p, nullptr, nullptr), out);
    } else {
      const float* data = (const float*)p.matrix->data;
      tile_float<M, V, kPrefetch>(x, data + p.first * panel, data + p.second * panel, half, p.matrix->num_inputs, Ahead<kPrefetch>(p, nullptr, nullptr), out);
    }
  }
};

struct PrefillWork {
  const MlaPrefillCall* call;
  LatentRows rows;
  int first_head, num_heads;      // taken at a time
  int piece_start, piece_tokens;  // of the context
  int row_blocks;                 // of kRowsPerTask rows
  int key_pairs, value_pairs;     // pairs of panels of W_UK and W_UV
  int value_panels;
  int latent_stride;              // units of a row in `latents`
  size_t key_bytes, value_bytes;  // of one head's piece
  const void** token_rows;        // [kPieceTokens] latents, converted where need be
  uint32_t* latents;              // [kPieceTokens][kv_lora_rank], where they are converted
  uint32_t* rope;                 // [panels of keys][rope units][32]
  uint8_t* keys;                  // [heads][panels of keys][units][32]
  uint8_t* values;                // [heads][tiles][value_panels][128][32], pairs of keys side by side where they are pairs
  float* sums;                    // [heads][rows][value_panels * 32]
  float* maximum;                 // [heads][rows]
  float* denominator;             // [heads][rows]
};

// The piece's latents in the form in which they are multiplied, and the rotated part of its keys. A task: 32 tokens.
template <class U>
void gather_task(void* context, int panel, int thread) {
  const PrefillWork& work = *(const PrefillWork*)context;
  const MlaPrefillCall& call = *work.call;
  const int rope_units = call.rope_dim / U::kNumbers, first = panel * kPanelColumns;
  const int count = work.piece_tokens - first < kPanelColumns ? work.piece_tokens - first : kPanelColumns;
  const int format = U::kNumbers == 2 ? kBfloat16 : kFloat32;
  uint32_t* rotated = (uint32_t*)thread_scratch(thread, (size_t)kPanelColumns * rope_units * 4);
  for (int i = 0; i < count; i++) {
    const void* row = work.rows.at(work.piece_start + first + i);
    work.token_rows[first + i] = row_units<U>(row, work.rows.format, 0, call.kv_lora_rank,
                                              work.latents + (size_t)(first + i) * work.latent_stride);
    convert_row(row, work.rows.format, call.kv_lora_rank, rotated + (size_t)i * rope_units, format, 0, call.rope_dim);
  }
  transpose(rotated, rope_units, count, rope_units, work.rope + (size_t)panel * rope_units * kPanelColumns, kPanelColumns);
}

// The two panels of a matrix from `panel` on as float32.
inline const float* widen_panels(const Matrix& matrix, int panel, int count, float* to) {
  const size_t numbers = (size_t)matrix.num_inputs * kPanelColumns;
  if (matrix.format == kFloat32) return (const float*)matrix.data + panel * numbers;
  const uint32_t* from = (const uint32_t*)((const uint16_t*)matrix.data + panel * numbers);
  uint32_t* out = (uint32_t*)to;
  for (size_t pair = 0; pair < count * numbers / (2 * kPanelColumns); pair++, from += 32, out += 64)
    for (int i = 0; i < 32; i++) {
      out[i] = from[i] << 16;
      out[32 + i] = from[i] & 0xffff0000u;
    }
  return to;
}

// Keys of one head: [tokens][columns] of a product to [columns][tokens] of panels.
template <class U>
inline void store_keys(const PrefillWork& work, const float* product, int stride, int num_tokens, int token,
                       int first_dim, int num_dims, uint32_t* keys) {
  const int units = (work.call->qk_nope_dim + work.call->rope_dim) / U::kNumbers;
  for (int m = 0; m < num_tokens; m++) {
    const uint32_t* from = (const uint32_t*)(product + m * stride);
    alignas(64) uint16_t halves[2 * kPanelColumns];
    if constexpr (U::kNumbers == 2) {
      convert_row(product, kFloat32, m * stride, halves, kBfloat16, 0, num_dims);
      from = (const uint32_t*)halves;
    }
    uint32_t* to = keys + ((size_t)((token + m) / kPanelColumns) * units + first_dim / U::kNumbers) * kPanelColumns +
                   (token + m) % kPanelColumns;
    for (int i = 0; i < num_dims / U::kNumbers; i++) to[i * kPanelColumns] = from[i];
  }
}

// Values of one head: rows of a product to rows of panels. For pairs `token` is even; an odd last one has a zero beside it.
template <class U>
inline void store_values(const float* product, int stride, int num_tokens, int token, int panel, int count,
                         int num_panels, uint32_t* values) {
  for (int m = 0; m < num_tokens; m += U::kNumbers)
    for (int i = 0; i < count; i++) {
      const float* from = product + m * stride + i * kPanelColumns;
      const int tile = (token + m) / kKeysPerTile, row = (token + m) % kKeysPerTile / U::kNumbers;
      uint32_t* to = values + (((size_t)tile * num_panels + panel + i) * (kKeysPerTile / U::kNumbers) + row) * kPanelColumns;
      for (int j = 0; j < kPanelColumns; j += 16) {
        if constexpr (U::kNumbers == 2)
          store_pairs(to + j, Simd::load(from + j), m + 1 < num_tokens ? Simd::load(from + stride + j) : Simd::zero());
        else
          Simd::store((float*)to + j, Simd::load(from + j));
      }
    }
}

// Two panels' outputs of W_UK or W_UV of one head, for kExpandTokens tokens.
template <class T, class U>
void expand_task(void* context, int task, int thread) {
  const PrefillWork& work = *(const PrefillWork*)context;
  const MlaPrefillCall& call = *work.call;
  const int pairs = work.key_pairs + work.value_pairs;
  const int parts = (work.piece_tokens + kExpandTokens - 1) / kExpandTokens;
  const int part = task % parts, pair = task / parts % pairs, head = task / parts / pairs;
  const bool is_key = pair < work.key_pairs;
  const int panel = 2 * (is_key ? pair : pair - work.key_pairs);
  Matrix matrix = (is_key ? call.key_up : call.value_up)[work.first_head + head];
  const int left = num_panels(matrix.num_outputs) - panel, count = left < 2 ? left : 2;
  const int num_dims = matrix.num_outputs - panel * kPanelColumns < count * kPanelColumns
                           ? matrix.num_outputs - panel * kPanelColumns
                           : count * kPanelColumns;
  uint32_t* keys = (uint32_t*)(work.keys + head * work.key_bytes);
  uint32_t* values = (uint32_t*)(work.values + head * work.value_bytes);
  Panels panels = {&matrix, panel, panel + 1};
  if constexpr (U::kNumbers == 1) {
    float* wide = (float*)thread_scratch(thread, (size_t)2 * matrix.num_inputs * kPanelColumns * 4);
    matrix.data = widen_panels(matrix, panel, count, wide);
    panels.first = 0;
    panels.second = 1;
  }
  const int first = part * kExpandTokens;
  const int end = first + kExpandTokens < work.piece_tokens ? first + kExpandTokens : work.piece_tokens;
  constexpr int kStep = T::kRows;
  static_assert(U::kNumbers == 1 || kStep % 2 == 0, "pairs of tokens stay together");
  for (int token = first; token < end; token += kStep) {
    const int height = end - token < kStep ? end - token : kStep;
    alignas(64) float product[kMaxRows * 2 * kPanelColumns];
    multiply<T, false>((const typename T::Row*)work.token_rows + token, height, panels, count, product);
    if (is_key)
      store_keys<U>(work, product, count * kPanelColumns, height, token, panel * kPanelColumns, num_dims, keys);
    else
      store_values<U>(product, count * kPanelColumns, height, token, panel, count, work.value_panels, values);
  }
  if (pair > 0) return;
  const int rope_units = call.rope_dim / U::kNumbers, nope_units = call.qk_nope_dim / U::kNumbers;
  for (int block = first / kPanelColumns; block * kPanelColumns < end; block++)
    memcpy(keys + ((size_t)block * (nope_units + rope_units) + nope_units) * kPanelColumns,
           work.rope + (size_t)block * rope_units * kPanelColumns, (size_t)rope_units * kPanelColumns * 4);
}

// What one (head, block of rows) needs while it attends.
struct BlockScratch {
  float* scores;        // [pairs of panels][kRowsPerTask][64]
  uint32_t* weights;    // [kRowsPerTask][keys], as units
  uint32_t* queries;    // [kRowsPerTask][qk_head_dim], where they are converted
  float* decay;         // [kRowsPerTask]
  float* new_maximum;   // [kRowsPerTask]
};

inline float* score_segment(float* scores, int row, int column) {
  return scores + ((size_t)(column / 64) * kRowsPerTask + row) * 64 + column % 64;
}

// The largest score of a row's first `visible` keys; what follows them up to a whole vector becomes the lowest.
inline float largest_score(float* scores, int row, int visible) {
  for (int i = visible; i % 16; i++) *score_segment(scores, row, i) = kLowest;
  Simd::Floats largest = Simd::set1(kLowest);
  for (int i = 0; i < visible; i += 16) largest = Simd::max(largest, Simd::load(score_segment(scores, row, i)));
  return Simd::largest(largest);
}

// exp(score * scale - maximum) of the visible keys, zero behind them; returns the sum.
template <class U>
inline float weigh_row(float* scores, int row, int visible, float scale, float maximum, uint32_t* weights) {
  const Simd::Floats factor = Simd::set1(scale), shift = Simd::set1(-maximum);
  Simd::Floats sum = Simd::zero();
  int i = 0;
  for (; i < visible; i += 16) {
    Simd::Floats weight = exponential(Simd::fma(Simd::load(score_segment(scores, row, i)), factor, shift));
    if (visible - i < 16) {
      alignas(64) float lanes[16];
      Simd::store(lanes, weight);
      for (int j = visible - i; j < 16; j++) lanes[j] = 0.0f;
      weight = Simd::load(lanes);
    }
    sum = Simd::add(sum, weight);
    if constexpr (U::kNumbers == 2)
      Simd::store_bf16((uint16_t*)weights + i, weight);
    else
      Simd::store((float*)weights + i, weight);
  }
  if (i < kKeysPerTile) memset((uint8_t*)weights + i * (4 / U::kNumbers), 0, (kKeysPerTile - i) * (4 / U::kNumbers));
  return Simd::sum(sum);
}

// One tile of keys for rows [first_row, last_row) of a block, all of which see some of it.
template <class T, class U>
inline void attend_tile(const PrefillWork& work, int head, int tile, int block_start, int first_row, int last_row,
                        const typename T::Row* queries, const BlockScratch& memory) {
  const MlaPrefillCall& call = *work.call;
  const int tile_start = work.piece_start + tile * kKeysPerTile, position = call.seq_len - call.num_rows + block_start;
  auto visible = [&](int row) {
    const int count = position + row - tile_start + 1;
    return count < kKeysPerTile ? count : kKeysPerTile;
  };
  const int num_rows = last_row - first_row, head_dim = call.qk_nope_dim + call.rope_dim;
  const Matrix keys = {work.keys + head * work.key_bytes, nullptr, U::kNumbers == 2 ? kBfloat16 : kFloat32, kPieceTokens,
                       head_dim, 0};
  for (int pair = 0; pair < kTilePanels / 2; pair++)
    for_tiles(num_rows, T::kRows, [&](int, int, int offset, int height) {
      const int row = first_row + offset, seen = visible(row + height - 1) - pair * 64;
      if (seen <= 0) return;
      const int panel = tile * kTilePanels + 2 * pair;
      float* out = score_segment(memory.scores, row, pair * 64);
      if (seen > kPanelColumns) return multiply<T, false>(queries + row, height, {&keys, panel, panel + 1}, 2, out);
      alignas(64) float product[kMaxRows * kPanelColumns];
      multiply<T, false>(queries + row, height, {&keys, panel, 0}, 1, product);
      for (int m = 0; m < height; m++) memcpy(out + m * 64, product + m * kPanelColumns, kPanelColumns * 4);
    });

  const size_t state = (size_t)head * call.num_rows + block_start;
  float *maximum = work.maximum + state, *denominator = work.denominator + state;
  for (int row = first_row; row < last_row; row++) {
    const float largest = largest_score(memory.scores, row, visible(row)) * call.scale;
    memory.new_maximum[row] = largest > maximum[row] ? largest : maximum[row];
    memory.decay[row] = maximum[row] - memory.new_maximum[row];
    maximum[row] = memory.new_maximum[row];
  }
  for (int row = first_row; row < last_row; row += 16)  // the buffer reaches beyond the last row
    Simd::store(memory.decay + row, exponential(Simd::load(memory.decay + row)));
  const int weight_units = kKeysPerTile / U::kNumbers;
  for (int row = first_row; row < last_row; row++) {
    const float sum = weigh_row<U>(memory.scores, row, visible(row), call.scale, maximum[row],
                                   memory.weights + (size_t)row * weight_units);
    denominator[row] = denominator[row] * memory.decay[row] + sum;
  }

  const int width = work.value_panels * kPanelColumns;
  float* sums = work.sums + state * width;
  const size_t tile_units = (size_t)work.value_panels * weight_units * kPanelColumns;
  Matrix values = {(const uint32_t*)(work.values + head * work.value_bytes) + tile * tile_units, nullptr, keys.format, width,
                   0, 0};
  for (int panel = 0; panel < work.value_panels; panel += 2) {
    const int count = work.value_panels - panel < 2 ? 1 : 2;
    for_tiles(num_rows, T::kRows, [&](int, int, int offset, int height) {
      const int row = first_row + offset;
      values.num_inputs = (visible(row + height - 1) + U::kNumbers - 1) / U::kNumbers * U::kNumbers;
      typename T::Row x[kMaxRows];
      for (int m = 0; m < height; m++) x[m] = (typename T::Row)(memory.weights + (size_t)(row + m) * weight_units);
      alignas(64) float product[kMaxRows * 2 * kPanelColumns];
      multiply<ValueTiles<T>, false>(x, height, {&values, panel, panel + 1}, count, product);
      for (int m = 0; m < height; m++) {
        const Simd::Floats factor = Simd::set1(memory.decay[row + m]);
        float* to = sums + (size_t)(row + m) * width + panel * kPanelColumns;
        const float* from = product + m * count * kPanelColumns;
        // Keys behind a row may leave a zero of either sign; plus zero makes it positive.
        for (int i = 0; i < count * kPanelColumns; i += 16)
          Simd::store(to + i, Simd::fma(Simd::load(to + i), factor, Simd::add(Simd::load(from + i), Simd::zero())));
      }
    });
  }
}

template <class T, class U>
void attend_task(void* context, int task, int thread) {
  const PrefillWork& work = *(const PrefillWork*)context;
  const MlaPrefillCall& call = *work.call;
  const int head = task / work.row_blocks;
  const int start = (work.row_blocks - 1 - task % work.row_blocks) * kRowsPerTask;  // the longest first
  const int num_rows = call.num_rows - start < kRowsPerTask ? call.num_rows - start : kRowsPerTask;
  const int position = call.seq_len - call.num_rows + start;  // of the block's first row
  const int last_position = position + num_rows - 1;
  const int piece_end = work.piece_start + work.piece_tokens;
  if (last_position < work.piece_start) return;

  const int head_dim = call.qk_nope_dim + call.rope_dim, units = round_up(head_dim, 16) / U::kNumbers;
  const size_t weight_bytes = (size_t)kRowsPerTask * kKeysPerTile * (4 / U::kNumbers);
  uint8_t* data = (uint8_t*)thread_scratch(thread, (size_t)kRowsPerTask * (kKeysPerTile + units) * 4 + weight_bytes +
                                                       2 * (kRowsPerTask + 16) * 4);
  BlockScratch memory;
  memory.scores = (float*)data;
  memory.weights = (uint32_t*)(data + (size_t)kRowsPerTask * kKeysPerTile * 4);
  memory.queries = (uint32_t*)((uint8_t*)memory.weights + weight_bytes);
  memory.decay = (float*)(memory.queries + (size_t)kRowsPerTask * units);
  memory.new_maximum = memory.decay + kRowsPerTask + 16;
  typename T::Row queries[kRowsPerTask];
  for (int row = 0; row < num_rows; row++) {
    const size_t at = (size_t)(start + row) * call.query_row_stride + (size_t)(work.first_head + head) * call.query_head_stride;
    queries[row] = (typename T::Row)row_units<U>(call.query, call.query_format, at, head_dim, memory.queries + (size_t)row * units);
  }

  const int width = work.value_panels * kPanelColumns;
  const size_t state = (size_t)head * call.num_rows + start;
  if (work.piece_start == 0) {
    memset(work.sums + state * width, 0, (size_t)num_rows * width * 4);
    for (int row = 0; row < num_rows; row++) {
      work.maximum[state + row] = kLowest;
      work.denominator[state + row] = 0.0f;
    }
  }
  for (int tile = 0; tile * kKeysPerTile < work.piece_tokens; tile++) {
    const int tile_start = work.piece_start + tile * kKeysPerTile;
    if (tile_start > last_position) break;
    const int first_row = tile_start > position ? tile_start - position : 0;
    attend_tile<T, U>(work, head, tile, start, first_row, num_rows, queries, memory);
  }
  if (piece_end <= last_position) return;
  for (int row = 0; row < num_rows; row++) {
    const Simd::Floats factor = Simd::set1(1.0f / work.denominator[state + row]);
    const float* from = work.sums + (state + row) * width;
    const size_t to = (size_t)(start + row) * call.out_row_stride + (size_t)(work.first_head + head) * call.out_head_stride;
    for (int i = 0; i < call.v_head_dim; i += 16) {
      const Simd::Floats value = Simd::mul(Simd::load(from + i), factor);
      if (call.v_head_dim - i >= 16)
        store_as(call.out, call.query_format, to + i, value);
      else
        store_tail(call.out, call.query_format, to + i, value, call.v_head_dim - i);
    }
  }
}

template <class T, class U>
void prefill_as(const MlaPrefillCall& call) {
  PrefillWork work = {};
  work.call = &call;
  work.rows = {call.cache, call.block_table, call.cache_row_stride, call.block_size, call.cache_format};
  work.row_blocks = (call.num_rows + kRowsPerTask - 1) / kRowsPerTask;
  work.value_panels = num_panels(call.v_head_dim);
  work.key_pairs = (num_panels(call.qk_nope_dim) + 1) / 2;
  work.value_pairs = (work.value_panels + 1) / 2;
  work.latent_stride = round_up(call.kv_lora_rank, 32) / U::kNumbers;
  // Enough tasks for the threads, and no more memory than that takes.
  int heads_at_once = (4 * num_threads() + work.row_blocks - 1) / work.row_blocks;
  if (heads_at_once < 2 * num_threads()) heads_at_once = 2 * num_threads();
  if (heads_at_once > call.num_heads) heads_at_once = call.num_heads;

  const int tokens = call.seq_len < kPieceTokens ? round_up(call.seq_len, kKeysPerTile) : kPieceTokens;
  const int units = (call.qk_nope_dim + call.rope_dim) / U::kNumbers, width = work.value_panels * kPanelColumns;
  work.key_bytes = (size_t)tokens * units * 4;
  work.value_bytes = (size_t)tokens / U::kNumbers * width * 4;
  const size_t states = (size_t)heads_at_once * call.num_rows;
  const size_t row_bytes = round_up(sizeof(void*) * tokens, 64), latent_bytes = (size_t)tokens * work.latent_stride * 4;
  const size_t rope_bytes = (size_t)tokens * (call.rope_dim / U::kNumbers) * 4;
  uint8_t* memory = (uint8_t*)scratch(kMlaSlot, row_bytes + latent_bytes + rope_bytes +
                                                    heads_at_once * (work.key_bytes + work.value_bytes) +
                                                    states * (width + 2) * 4);
  work.token_rows = (const void**)memory;
  work.latents = (uint32_t*)(memory += row_bytes);
  work.rope = (uint32_t*)(memory += latent_bytes);
  work.keys = memory += rope_bytes;
  work.values = memory += heads_at_once * work.key_bytes;
  work.sums = (float*)(memory += heads_at_once * work.value_bytes);
  work.maximum = work.sums + states * width;
  work.denominator = work.maximum + states;
  for (work.first_head = 0; work.first_head < call.num_heads; work.first_head += heads_at_once) {
    const int left = call.num_heads - work.first_head;
    work.num_heads = left < heads_at_once ? left : heads_at_once;
    for (work.piece_start = 0; work.piece_start < call.seq_len; work.piece_start += kPieceTokens) {
      const int left_tokens = call.seq_len - work.piece_start;
      work.piece_tokens = left_tokens < kPieceTokens ? left_tokens : kPieceTokens;
      const int parts = (work.piece_tokens + kExpandTokens - 1) / kExpandTokens;
      parallel_for((work.piece_tokens + kPanelColumns - 1) / kPanelColumns, gather_task<U>, &work);
      parallel_for(work.num_heads * (work.key_pairs + work.value_pairs) * parts, expand_task<T, U>, &work);
      parallel_for(work.num_heads * work.row_blocks, attend_task<T, U>, &work);
    }
  }
}

template <class S>
void prefill_any(const MlaPrefillCall& call) {
  if constexpr (sizeof(typename S::Bf16Input) == 2)
    if (call.query_format == kBfloat16 && call.cache_format == kBfloat16 && call.key_up->format == kBfloat16 &&
        call.value_up->format == kBfloat16)
      return prefill_as<Tiles<kBfloat16>, PairUnits<S>>(call);
  prefill_as<Tiles<kFloat32>, FloatUnits>(call);
}

void mla_prefill(const MlaPrefillCall* call) {
  if (call->num_rows > 0) prefill_any<Simd>(*call);
}

}  // namespace
