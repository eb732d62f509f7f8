// The library's C interface, and the table of functions that each instruction set implements.
//
// Matrices are packed once, at load, into panels of 32 outputs, so that every step of a product reads whole cache lines
// in order (K = inputs):
//   float32   [panels][K][32]
//   bfloat16  [panels][K / 2][32][2]
//   int8      [panels][K / 4][32][4], numbers + 128; scales [panels][K / group_size][32]
//   int4      [panels][K / 4][16][4], outputs 0-15 in the low nibbles, 16-31 in the high ones, numbers + 8; scales alike
//   compact   bfloat16 in 12 bits, without loss: see compact.h
//
// Row-invariance: one output of one row is summed by one lane over the inputs in ascending order (int8 and int4: exactly
// within a group, groups in ascending order; AMX: see amx_tile.h), however many rows, threads or neighbours there are.
#pragma once

#include <stddef.h>
#include <stdint.h>

enum { kAbi = 6 };  // raised with every change of a struct below; library.py refuses another one
enum { kPanelColumns = 32 };
enum Format { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2, kInt4 = 3, kCompact = 4 };

inline size_t element_bytes(int format) { return format == kBfloat16 ? 2 : 4; }  // of activations

struct Dictionary;  // compact.h

struct Matrix {  // packed; mirrors PackedMatrix in Python
  const void* data;
  const float* scales;  // int8 and int4
  const Dictionary* dictionaries;  // compact: [panels], then the exceptions
  int32_t format;
  int32_t num_outputs;  // N, before padding to whole panels
  int32_t num_inputs;   // K
  int32_t group_size;   // inputs that share a scale; int8 and int4
};

struct LinearCall {
  const Matrix* matrix;
  const void* x;  // [num_rows, num_inputs], float32 or bfloat16
  void* out;      // [num_rows, num_outputs]
  const void* residual;  // like out, added before rounding; may be null
  int64_t x_stride, out_stride;  // elements between rows
  int32_t num_rows;
  int32_t x_format, out_format;
};

// One matrix for each of several heads; head h of x and out lies h * head_stride elements after head 0.
struct HeadsCall {
  const Matrix* matrices;
  const void* x;
  void* out;
  int64_t x_stride, x_head_stride, out_stride, out_head_stride;
  int32_t num_heads, num_rows;
  int32_t x_format, out_format;
};

struct Expert {  // data is null for an expert that is not here
  Matrix w13;    // gate outputs, padded to whole panels, then up outputs, padded
  Matrix w2;
};

struct ExpertsCall {
  const Expert* experts;       // by logical expert id
  const void* x;               // [num_rows, hidden_size]
  const int32_t* assignments;  // [4, num_assignments]; null: row i goes to expert 0 with weight 1, into sum i
  const void* residual;        // like the sums, in x_format; added to them before rounding; may be null
  void* out;                   // [num_partial_sums, hidden_size]
  int32_t num_experts, num_rows, num_assignments, num_partial_sums;
  int32_t hidden_size, intermediate_size;
  int32_t x_format, out_format;

  float weight(int i) const { return assignments ? ((const float*)assignments)[i] : 1.0f; }
  int32_t row(int i) const { return assignments ? assignments[(size_t)num_assignments + i] : i; }
  int32_t expert_id(int i) const { return assignments ? assignments[2 * (size_t)num_assignments + i] : 0; }
  int32_t partial_sum(int i) const { return assignments ? assignments[3 * (size_t)num_assignments + i] : i; }
};

struct NormCall {
  const void* x;
  const void* weight;  // in x's format
  void* out;
  int64_t x_stride, out_stride;
  int32_t num_rows, num_columns;
  int32_t format;
  float eps;
};

// Multi-head latent attention. One layer's latent cache: [num_blocks][block_size][cache_row_stride], a row kv_c | k_pe.
// Strides in elements.
struct MlaPrepareCall {
  const void* kv;         // [num_rows, kv_lora_rank + rope_dim], as projected
  const void* norm;       // [kv_lora_rank], in kv's format
  void* query;            // [num_rows, num_heads, qk_nope_dim + rope_dim], the second part rotated in place
  const float* cos;       // [num_rows, rope_dim / 2]
  const float* sin;
  const int64_t* slot_mapping;  // [num_rows]
  void* cache;
  int64_t kv_row_stride, query_row_stride, query_head_stride, cache_row_stride;
  int32_t num_rows, num_heads, kv_lora_rank, rope_dim, qk_nope_dim;
  int32_t format, cache_format;
  float eps;
};

struct MlaDecodeCall {
  const void* query;       // [num_rows, num_heads, kv_lora_rank], absorbed
  const void* query_rope;  // [num_rows, num_heads, rope_dim], rotated
  const void* cache;
  void* out;          // [num_rows, num_heads, kv_lora_rank], in query's format
  const int32_t* block_tables;  // [num_sequences, max_num_blocks]
  const int32_t* sequences;     // [num_rows], into block_tables; null: row i is sequence i
  const int32_t* context_lens;  // [num_rows], tokens that the row sees; 1 or more
  int64_t query_row_stride, query_head_stride, rope_row_stride, rope_head_stride;
  int64_t out_row_stride, out_head_stride, cache_row_stride;
  int32_t num_rows, num_heads, kv_lora_rank, rope_dim, block_size, max_num_blocks;
  int32_t query_format, cache_format;
  float scale;
};

struct MlaPrefillCall {
  const void* query;  // [num_rows, num_heads, qk_nope_dim + rope_dim], rotated: the sequence's last rows
  const void* cache;
  void* out;          // [num_rows, num_heads, v_head_dim], in query's format
  const int32_t* block_table;
  const Matrix* key_up;    // [num_heads], kv_lora_rank -> qk_nope_dim
  const Matrix* value_up;  // [num_heads], kv_lora_rank -> v_head_dim
  int64_t query_row_stride, query_head_stride, out_row_stride, out_head_stride, cache_row_stride;
  int32_t num_rows, num_heads, seq_len, kv_lora_rank, rope_dim, qk_nope_dim, v_head_dim, block_size;
  int32_t query_format, cache_format;
  float scale;
};

// Neighbouring rows of a step that attend in the same form.
struct MlaSpan {
  int32_t start_row, num_rows;
  int32_t is_absorbed;  // each row on its own; else all are of one sequence
  int32_t sequence, num_context_tokens;  // of those; tokens before its first row
};

// One decoder layer from hidden states to what its MLP is given: norm, attention, residual, norm.
struct MlaLayer {
  const void* attention_norm;  // [hidden_size]; this and the other norms in `format`
  const Matrix* down;          // queries (or their low rank), then from `latents_start` on the latents
  const void* query_norm;      // [query_up->num_inputs]; null, as query_up, where queries are projected in one step
  const Matrix* query_up;
  const void* kv_norm;         // [kv_lora_rank]
  const Matrix* absorb_key;    // [num_heads], qk_nope_dim -> kv_lora_rank
  const Matrix* expand_key;    // [num_heads], kv_lora_rank -> qk_nope_dim
  const Matrix* expand_value;  // [num_heads], kv_lora_rank -> v_head_dim
  const Matrix* output;
  const void* mlp_norm;        // [hidden_size]
  void* cache;
  int64_t cache_row_stride;
  int32_t latents_start, num_heads, kv_lora_rank, rope_dim, qk_nope_dim, v_head_dim, block_size;
  int32_t format, cache_format;  // of activations, of the cache
  float norm_eps, latent_norm_eps, scale;
};

// What the layers of a step have in common; all contiguous.
struct MlaStep {
  const int64_t* slot_mapping;   // [num_rows]
  const int32_t* block_tables;   // [num_sequences, max_num_blocks]
  const int32_t* sequences;      // [num_rows], of absorbed rows; into block_tables
  const int32_t* context_lens;   // [num_rows], of absorbed rows
  const MlaSpan* spans;          // every row that is wanted is in one
  const int64_t* output_rows;    // [num_output_rows], those that are wanted, ascending; not read where all are
  int32_t num_rows, num_output_rows, num_spans, max_num_blocks;
};

struct MlaRows {
  const float* cos;  // [num_rows, rope_dim / 2]
  const float* sin;
  const void* hidden_states;  // [num_rows, hidden_size]
  void* out;                  // [num_output_rows, hidden_size], with what attention adds
  void* normed;               // [num_output_rows, hidden_size], for the MLP
};

struct MlaLayerCall : MlaLayer, MlaStep, MlaRows {};

// What an instruction set implements.
struct KernelTable {
  void (*linear)(const LinearCall*);
  void (*heads)(const HeadsCall*);
  void (*experts)(const ExpertsCall*);
  void (*rms_norm)(const NormCall*);
  void (*mla_prepare)(const MlaPrepareCall*);
  void (*mla_decode)(const MlaDecodeCall*);
  void (*mla_prefill)(const MlaPrefillCall*);
  void (*choose_dictionary)(const uint16_t* plain, int num_inputs, Dictionary* to);
  void (*compact_panel)(const uint16_t* plain, int panel, const Matrix* to);
  double (*peak)(int format, long iterations);  // operations of one thread
  float (*read)(const float* data, size_t count);  // a sum, so that it is read; count is a multiple of 64
};

void mla_layer(const KernelTable& kernels, const MlaLayerCall& call);

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 11)  // older ones come with assemblers that may not know it
#define MOBULA_HAS_AMX
const KernelTable* amx_table();
#endif
const KernelTable* avx512bf16_table();
const KernelTable* avx512vnni_table();
const KernelTable* avx2_table();
const KernelTable* portable_table();
