// Causal attention of one sequence's prompt rows in the naive form: keys and values are expanded from the latents head by
// head, then flash attention (arXiv 2205.14135) runs over them.
//
// The context is taken in pieces of 1024 tokens, and in tiles of 128 keys (512 with AMX) within them, both at fixed
// positions. A few heads at a time: their keys and values of one piece are expanded, then every (head, block of rows)
// attends to them. A row sees a tile's keys up to its own position, and skips tiles behind it. So a row's bits depend on its
// query and on the tokens up to its position, not on how a prompt is cut, on other rows or on threads, as long as all are
// finite. Memory: a piece's keys and values, and the fp32 output, of as many heads as are taken at a time.
//
// Where the instruction set multiplies bfloat16 pairs, and everything is bfloat16, keys, values and weights are rounded to
// it; elsewhere all is float32, also between bfloat16 activations.
#pragma once

#include "mla_product.h"

namespace {

constexpr int kPieceTokens = 1024;    // of context, expanded at once
constexpr int kKeysPerTile = Simd::kHasAmx ? 512 : 128;  // between two steps of the online softmax
constexpr int kScoreStride = Simd::kHasAmx ? kKeysPerTile + 16 : kKeysPerTile;  // powers of two share sets of the cache
constexpr int kRowsBeyond = Simd::kHasAmx ? 32 : 0;  // that a product may touch behind a block's last
constexpr int kKeysPerGroup = kBlockColumns;
constexpr int kExpandTokens = 512;    // a task
constexpr int kRowsPerBlock = 96;     // queries that a tile of keys meets while it is in cache
constexpr float kLowest = -3.4e38f;

struct PrefillWork {
  const MlaPrefillCall* call;
  LatentRows rows;
  int first_head, num_heads;      // taken at a time
  int piece_start, piece_tokens;  // of the context
  int row_blocks;
  int key_blocks, value_blocks;   // of 64 outputs of W_UK and W_UV
  size_t key_bytes, value_bytes;  // of one head's piece
  uint32_t* latents;              // [slabs][kPieceTokens][64 units]
  uint32_t* rope;                 // [groups of keys][rope units][64]
  uint8_t* keys;                  // [heads][groups of keys][units][64]
  uint8_t* values;                // [heads][tiles][value_blocks][keys as units][64]
  float* sums;                    // [heads][rows][value_blocks * 64]
  float* maximum;                 // [heads][rows]
  float* denominator;             // [heads][rows]
};

// A group of the piece's latents in the form in which they are multiplied, and the rotated part of its keys.
template <class U>
void gather_task(void* context, int group, int thread) {
  const PrefillWork& work = *(const PrefillWork*)context;
  const MlaPrefillCall& call = *work.call;
  const int rope_units = call.rope_dim / U::kNumbers, first = group * kKeysPerGroup;
  const int count = work.piece_tokens - first < kKeysPerGroup ? work.piece_tokens - first : kKeysPerGroup;
  uint32_t* rotated = (uint32_t*)thread_scratch(thread, (size_t)kKeysPerGroup * rope_units * 4);
  for (int i = 0; i < count; i++) {
    const void* row = work.rows.at(work.piece_start + first + i);
    store_slabs<U>(row, work.rows.format, 0, call.kv_lora_rank, (typename U::Unit*)work.latents + (first + i) * kSlab,
                   (size_t)kPieceTokens * kSlab);
    convert_row(row, work.rows.format, call.kv_lora_rank, rotated + (size_t)i * rope_units,
                U::kNumbers == 2 ? kBfloat16 : kFloat32, 0, call.rope_dim);
  }
  transpose(rotated, rope_units, count, rope_units, work.rope + (size_t)group * rope_units * kKeysPerGroup, kKeysPerGroup);
}

// Up to two panels of a matrix side by side: [units of inputs][64], float32 or pairs.
template <class U>
inline void join_panels(const Matrix& matrix, int panel, uint32_t* to) {
  const int count = num_panels(matrix.num_outputs) - panel;
  for (int side = 0; side < 2; side++) {
    uint32_t* out = to + side * kPanelColumns;
    if (side >= count) {
      for (int i = 0; i < matrix.num_inputs / U::kNumbers; i++) memset(out + i * kBlockColumns, 0, kPanelColumns * 4);
      continue;
    }
    const size_t at = (size_t)(panel + side) * matrix.num_inputs * kPanelColumns;
    const uint32_t* from = (const uint32_t*)((const uint8_t*)matrix.data + at * element_bytes(matrix.format));
    if (U::kNumbers == 2 || matrix.format == kFloat32) {
      for (int i = 0; i < matrix.num_inputs / U::kNumbers; i++, from += kPanelColumns)
        memcpy(out + i * kBlockColumns, from, kPanelColumns * 4);
    } else {
      for (int i = 0; i < matrix.num_inputs; i += 2, from += kPanelColumns)
        for (int j = 0; j < kPanelColumns; j++) {
          out[i * kBlockColumns + j] = from[j] << 16;
          out[(i + 1) * kBlockColumns + j] = from[j] & 0xffff0000u;
        }
    }
  }
}

// Keys of one group: product [tokens][64 dims] to keys [units][64 tokens].
template <class U>
inline void store_keys(const float* product, int num_tokens, int num_dims, uint32_t* keys) {
  if constexpr (U::kNumbers == 2) {
    alignas(64) uint32_t pairs[kKeysPerGroup * kBlockColumns / 2];
    for (int m = 0; m < num_tokens; m++)
      convert_row(product, kFloat32, m * kBlockColumns, pairs, kBfloat16, m * kBlockColumns, kBlockColumns);
    transpose(pairs, kBlockColumns / 2, num_tokens, num_dims / 2, keys, kKeysPerGroup);
  } else {
    transpose((const uint32_t*)product, kBlockColumns, num_tokens, num_dims, keys, kKeysPerGroup);
  }
}

// Values of a group: product [tokens][64 dims] to rows of the tile. An odd last token has zeros beside it, and behind the
// last one follow zeros as far as AMX reads.
template <class U>
inline void store_values(const float* product, int num_tokens, uint32_t* values) {
  alignas(64) static const float zeros[16] = {};
  for (int m = 0; m < num_tokens; m += U::kNumbers, values += kBlockColumns)
    for (int i = 0; i < kBlockColumns; i += 16) {
      const float* from = product + m * kBlockColumns + i;
      if constexpr (U::kNumbers == 2)
        store_pairs<Simd>(values + i, Simd::load(from), Simd::load(m + 1 < num_tokens ? from + kBlockColumns : zeros));
      else
        Simd::store((float*)values + i, Simd::load(from));
    }
  if constexpr (U::kUsesAmx)
    for (int m = round_up(num_tokens, 2); m < round_up(num_tokens, 32); m += 2, values += kBlockColumns)
      memset(values, 0, kBlockColumns * 4);
}

// 64 outputs of W_UK or W_UV of one head, for kExpandTokens tokens.
template <class U>
void expand_task(void* context, int task, int thread) {
  using Unit = typename U::Unit;
  const PrefillWork& work = *(const PrefillWork*)context;
  const MlaPrefillCall& call = *work.call;
  const int blocks = work.key_blocks + work.value_blocks;
  const int parts = (work.piece_tokens + kExpandTokens - 1) / kExpandTokens;
  const int part = task % parts, block = task / parts % blocks, head = task / parts / blocks;
  const bool is_key = block < work.key_blocks;
  const int column_block = is_key ? block : block - work.key_blocks, first_column = column_block * kBlockColumns;
  const Matrix& matrix = (is_key ? call.key_up : call.value_up)[work.first_head + head];
  const int num_columns = matrix.num_outputs - first_column < kBlockColumns ? matrix.num_outputs - first_column : kBlockColumns;
  const int k = call.kv_lora_rank / U::kNumbers;
  const int rope_units = call.rope_dim / U::kNumbers, key_units = call.qk_nope_dim / U::kNumbers + rope_units;
  uint32_t* weights = (uint32_t*)thread_scratch(thread, (size_t)k * kBlockColumns * 4);
  const ProductScope<U> scope;
  join_panels<U>(matrix, first_column / kPanelColumns, weights);
  uint32_t* keys = (uint32_t*)(work.keys + head * work.key_bytes);
  uint32_t* values = (uint32_t*)(work.values + head * work.value_bytes);
  const int first = part * kExpandTokens;
  const int end = first + kExpandTokens < work.piece_tokens ? first + kExpandTokens : work.piece_tokens;
  for (int token = first; token < end; token += kKeysPerGroup) {
    const int count = end - token < kKeysPerGroup ? end - token : kKeysPerGroup;
    alignas(64) float product[kKeysPerGroup * kBlockColumns];
    multiply_slabs<U>(count, (const Unit*)work.latents + token * kSlab, (size_t)kPieceTokens * kSlab, (const Unit*)weights, k,
                      product, kBlockColumns);
    if (is_key) {
      uint32_t* to = keys + (size_t)token * key_units;
      store_keys<U>(product, count, num_columns, to + (size_t)first_column / U::kNumbers * kKeysPerGroup);
      if (block == 0)
        memcpy(to + (size_t)(key_units - rope_units) * kKeysPerGroup, work.rope + (size_t)token * rope_units,
               (size_t)rope_units * kKeysPerGroup * 4);
    } else {
      const int tile = token / kKeysPerTile, row = token % kKeysPerTile;
      store_values<U>(product, count, values + (((size_t)tile * work.value_blocks + column_block) * kKeysPerTile + row) /
                                                   U::kNumbers * kBlockColumns);
    }
  }
}

// What one (head, block of rows) needs while it attends.
template <class U>
struct BlockScratch {
  typename U::Unit* queries;  // [slabs][kRowsPerBlock][64 units]
  float* scores;              // [kRowsPerBlock + kRowsBeyond][kScoreStride]; behind the queries, which are read as far
  typename U::Unit* weights;  // [kRowsPerBlock + kRowsBeyond][kScoreStride as units]
  float* decay;               // [kRowsPerBlock], and room for a vector
};

// The largest score of a row's first `visible` keys; what follows them up to a whole vector becomes the lowest.
inline float largest_score(float* scores, int visible) {
  for (int i = visible; i % 16; i++) scores[i] = kLowest;
  Simd::Floats largest = Simd::set1(kLowest);
  for (int i = 0; i < visible; i += 16) largest = Simd::max(largest, Simd::load(scores + i));
  return Simd::largest(largest);
}

// 2^(score * scale - maximum) of the visible keys, zero behind them; returns the sum.
template <class U>
inline float weigh_row(const float* scores, int visible, float scale, float maximum, typename U::Unit* weights) {
  const Simd::Floats factor = Simd::set1(scale), shift = Simd::set1(-maximum);
  const int format = U::kNumbers == 2 ? kBfloat16 : kFloat32;
  Simd::Floats sum = Simd::zero();
  int i = 0;
  for (; i < visible; i += 16) {
    Simd::Floats weight = power_of_two(Simd::fma(Simd::load(scores + i), factor, shift));
    if (visible - i < 16) {
      alignas(64) float lanes[16];
      Simd::store(lanes, weight);
      for (int j = visible - i; j < 16; j++) lanes[j] = 0.0f;
      weight = Simd::load(lanes);
    }
    sum = Simd::add(sum, weight);
    store_as(weights, format, i, weight);
  }
  for (; i < kKeysPerTile; i += 16) store_as(weights, format, i, Simd::zero());
  return Simd::sum(sum);
}

// sums [rows][64] = decayed + weights * values, of rows [first_row, last_row). visible(row): keys that it sees.
template <class U, int kWeightUnits, int kWeightStride, class Visible>
inline void add_values(const typename U::Unit* values, int first_row, int last_row, Visible visible,
                       const BlockScratch<U>& memory, float* sums, int width) {
  const auto units = [&](int row) { return (visible(row) + U::kNumbers - 1) / U::kNumbers; };
#ifdef MOBULA_AMX
  if constexpr (U::kUsesAmx) {
    for (int row = first_row; row < last_row; row += 2 * kTileRows) {
      const int height = last_row - row < 2 * kTileRows ? last_row - row : 2 * kTileRows;
      alignas(64) float product[2 * kTileRows * kBlockColumns];
      amx_multiply_rows(height, memory.weights + (size_t)row * kWeightStride, kWeightStride, kSlab, values,
                        round_up(units(row + height - 1), kStepUnits), product, kBlockColumns, true);
      for (int m = 0; m < height; m++) {
        const Simd::Floats decay = Simd::set1(memory.decay[row + m]);
        float* to = sums + (size_t)(row + m) * width;
        for (int i = 0; i < kBlockColumns; i += 16)
          Simd::store(to + i, Simd::fma(Simd::load(to + i), decay, Simd::load(product + m * kBlockColumns + i)));
      }
    }
    return;
  }
#endif
  for (int first = 0; first < kWeightUnits; first += kSlab)
    for (int row = first_row; row < last_row; row += kBlockRows) {
      const int height = last_row - row < kBlockRows ? last_row - row : kBlockRows;
      const int left = units(row + height - 1) - first;
      if (left <= 0) continue;
      multiply_rows<U, kWeightStride>(height, memory.weights + row * kWeightStride + first, values + first * kBlockColumns,
                                      left < kSlab ? left : kSlab, sums + (size_t)row * width, width, false,
                                      first == 0 ? memory.decay + row : nullptr);
    }
}

// One tile of keys for rows [first_row, last_row) of a block, all of which see some of it.
template <class U>
inline void attend_tile(const PrefillWork& work, int head, int tile, int block_start, int first_row, int last_row,
                        const BlockScratch<U>& memory) {
  using Unit = typename U::Unit;
  const MlaPrefillCall& call = *work.call;
  const int tile_start = work.piece_start + tile * kKeysPerTile, position = call.seq_len - call.num_rows + block_start;
  auto visible = [&](int row) {
    const int count = position + row - tile_start + 1;
    return count < kKeysPerTile ? count : kKeysPerTile;
  };
  const float scale = call.scale * kLog2E;
  const int key_units = (call.qk_nope_dim + call.rope_dim) / U::kNumbers;
  const Unit* keys = (const Unit*)(work.keys + head * work.key_bytes) + (size_t)tile * kKeysPerTile * key_units;
  for (int column = 0; column < kKeysPerTile; column += kKeysPerGroup) {
    const int first = tile_start + column - position > first_row ? tile_start + column - position : first_row;
    if (first >= last_row) break;
    multiply_slabs<U>(last_row - first, memory.queries + first * kSlab, (size_t)kRowsPerBlock * kSlab,
                      keys + (size_t)column * key_units, key_units, memory.scores + first * kScoreStride + column,
                      kScoreStride);
  }

  const size_t state = (size_t)head * call.num_rows + block_start;
  float *maximum = work.maximum + state, *denominator = work.denominator + state;
  for (int row = first_row; row < last_row; row++) {
    const float largest = largest_score(memory.scores + row * kScoreStride, visible(row)) * scale;
    const float before = maximum[row];
    maximum[row] = largest > before ? largest : before;
    memory.decay[row] = before - maximum[row];
  }
  for (int row = first_row; row < last_row; row += 16)
    Simd::store(memory.decay + row, power_of_two(Simd::load(memory.decay + row)));
  constexpr int kWeightUnits = kKeysPerTile / U::kNumbers, kWeightStride = kScoreStride / U::kNumbers;
  for (int row = first_row; row < last_row; row++) {
    const float sum = weigh_row<U>(memory.scores + row * kScoreStride, visible(row), scale, maximum[row],
                                   memory.weights + row * kWeightStride);
    denominator[row] = denominator[row] * memory.decay[row] + sum;
  }

  const int width = work.value_blocks * kBlockColumns;
  float* sums = work.sums + state * width;
  const Unit* values = (const Unit*)(work.values + head * work.value_bytes) + (size_t)tile * kWeightUnits * width;
  for (int block = 0; block < work.value_blocks; block++)
    add_values<U, kWeightUnits, kWeightStride>(values + (size_t)block * kWeightUnits * kBlockColumns, first_row, last_row, visible,
                                               memory, sums + block * kBlockColumns, width);
}

template <class U>
void attend_task(void* context, int task, int thread) {
  using Unit = typename U::Unit;
  const PrefillWork& work = *(const PrefillWork*)context;
  const MlaPrefillCall& call = *work.call;
  const int head = task / work.row_blocks;
  const int start = (work.row_blocks - 1 - task % work.row_blocks) * kRowsPerBlock;  // the longest first
  const int num_rows = call.num_rows - start < kRowsPerBlock ? call.num_rows - start : kRowsPerBlock;
  const int position = call.seq_len - call.num_rows + start;  // of the block's first row
  const int last_position = position + num_rows - 1;
  const int piece_end = work.piece_start + work.piece_tokens;
  if (last_position < work.piece_start) return;

  const int head_dim = call.qk_nope_dim + call.rope_dim, slabs = (head_dim / U::kNumbers + kSlab - 1) / kSlab;
  const size_t query_units = (size_t)slabs * kRowsPerBlock * kSlab;
  const size_t num_weights = (size_t)(kRowsPerBlock + kRowsBeyond) * kScoreStride;
  const ProductScope<U> scope;
  BlockScratch<U> memory;
  memory.queries = (Unit*)thread_scratch(thread, (query_units + 2 * num_weights + kRowsPerBlock + 16) * 4);
  memory.scores = (float*)(memory.queries + query_units);
  memory.weights = (Unit*)(memory.scores + num_weights);
  memory.decay = memory.scores + 2 * num_weights;
  for (int row = 0; row < num_rows; row++)
    store_slabs<U>(call.query, call.query_format,
                   (size_t)(start + row) * call.query_row_stride + (size_t)(work.first_head + head) * call.query_head_stride,
                   head_dim, memory.queries + row * kSlab, (size_t)kRowsPerBlock * kSlab);

  const int width = work.value_blocks * kBlockColumns;
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
    attend_tile<U>(work, head, tile, start, tile_start > position ? tile_start - position : 0, num_rows, memory);
  }
  if (piece_end <= last_position) return;
  for (int row = 0; row < num_rows; row++) {
    const Simd::Floats factor = Simd::set1(1.0f / work.denominator[state + row]);
    const float* from = work.sums + (state + row) * width;
    const size_t to = (size_t)(start + row) * call.out_row_stride + (size_t)(work.first_head + head) * call.out_head_stride;
    for (int i = 0; i < call.v_head_dim; i += 16) {
      // Keys behind a row may have left a zero of either sign; plus zero makes it positive.
      const Simd::Floats value = Simd::mul(Simd::add(Simd::load(from + i), Simd::zero()), factor);
      if (call.v_head_dim - i >= 16)
        store_as(call.out, call.query_format, to + i, value);
      else
        store_tail(call.out, call.query_format, to + i, value, call.v_head_dim - i);
    }
  }
}

template <class U>
void prefill_as(const MlaPrefillCall& call) {
  PrefillWork work = {};
  work.call = &call;
  work.rows = {call.cache, call.block_table, call.cache_row_stride, call.block_size, call.cache_format};
  work.row_blocks = (call.num_rows + kRowsPerBlock - 1) / kRowsPerBlock;
  work.key_blocks = (call.qk_nope_dim + kBlockColumns - 1) / kBlockColumns;
  work.value_blocks = (call.v_head_dim + kBlockColumns - 1) / kBlockColumns;
  // Enough tasks for the threads, and no more memory than that takes.
  int heads_at_once = (4 * num_threads() + work.row_blocks - 1) / work.row_blocks;
  if (heads_at_once < 2 * num_threads()) heads_at_once = 2 * num_threads();
  if (heads_at_once > call.num_heads) heads_at_once = call.num_heads;

  const int tokens = call.seq_len < kPieceTokens ? round_up(call.seq_len, kKeysPerTile) : kPieceTokens;
  const int width = work.value_blocks * kBlockColumns;
  work.key_bytes = (size_t)tokens * ((call.qk_nope_dim + call.rope_dim) / U::kNumbers) * 4;
  work.value_bytes = (size_t)tokens / U::kNumbers * width * 4;
  const size_t states = (size_t)heads_at_once * call.num_rows;
  const size_t latent_bytes = (size_t)round_up(call.kv_lora_rank / U::kNumbers, kSlab) * kPieceTokens * 4;
  const size_t rope_bytes = (size_t)tokens * (call.rope_dim / U::kNumbers) * 4;
  uint8_t* memory = (uint8_t*)scratch(kMlaSlot, latent_bytes + rope_bytes +
                                                    heads_at_once * (work.key_bytes + work.value_bytes) +
                                                    states * (width + 2) * 4);
  work.latents = (uint32_t*)memory;
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
      if (work.first_head == 0 || call.seq_len > kPieceTokens)  // else it is there still
        parallel_for((work.piece_tokens + kKeysPerGroup - 1) / kKeysPerGroup, gather_task<U>, &work);
      parallel_for(work.num_heads * (work.key_blocks + work.value_blocks) * parts, expand_task<U>, &work);
      parallel_for(work.num_heads * work.row_blocks, attend_task<U>, &work);
    }
  }
}

template <class S>
void prefill_any(const MlaPrefillCall& call) {
  if constexpr (sizeof(typename S::Bf16Input) == 2)
    if (call.query_format == kBfloat16 && call.cache_format == kBfloat16 && call.key_up->format == kBfloat16 &&
        call.value_up->format == kBfloat16) {
#ifdef MOBULA_AMX
      if (call.kv_lora_rank % 32 == 0 && (call.qk_nope_dim + call.rope_dim) % 32 == 0) return prefill_as<AmxUnits<S>>(call);
#endif
      return prefill_as<PairUnits<S>>(call);
    }
  prefill_as<FloatUnits>(call);
}

void mla_prefill(const MlaPrefillCall* call) {
  if (call->num_rows > 0) prefill_any<Simd>(*call);
}

}  // namespace
