// A layer's attention in one call: between its products there is nothing else to do, so the pool's threads stay awake.
#include <cstring>

#include "kernels.h"
#include "thread_pool.h"

namespace {

inline const void* offset(const void* data, int format, size_t count) {
  return (const char*)data + count * element_bytes(format);
}

inline size_t buffer_bytes(int format, size_t count) { return (count * element_bytes(format) + 63) / 64 * 64; }

// What passes between the products of one layer.
struct Buffers {
  char *normed, *down, *low_rank, *query, *attended, *absorbed, *latents, *wanted_attended, *wanted_hidden;

  explicit Buffers(const MlaLayerCall& call) {
    const size_t rows = call.num_rows, per_head = rows * call.num_heads;
    const bool is_whole = call.num_output_rows == call.num_rows;
    const size_t wanted = is_whole ? 0 : call.num_output_rows;
    size_t most_absorbed = 0;
    for (int i = 0; i < call.num_spans; i++)
      if (call.spans[i].is_absorbed && (size_t)call.spans[i].num_rows > most_absorbed) most_absorbed = call.spans[i].num_rows;
    const size_t latents_size = most_absorbed * call.num_heads * call.kv_lora_rank;
    const struct {
      char** buffer;
      size_t size;
    } needed[] = {
        {&normed, is_whole ? 0 : rows * call.output->num_outputs},
        {&down, rows * call.down->num_outputs},
        {&low_rank, call.query_up ? rows * call.query_up->num_inputs : 0},
        {&query, call.query_up ? rows * call.query_up->num_outputs : 0},
        {&attended, per_head * call.v_head_dim},
        {&absorbed, latents_size},
        {&latents, latents_size},
        {&wanted_attended, wanted * call.output->num_inputs},
        {&wanted_hidden, wanted * call.output->num_outputs},
    };
    size_t total = 0;
    for (const auto& each : needed) total += buffer_bytes(call.format, each.size);
    char* memory = (char*)scratch(kLayerSlot, total);
    for (const auto& each : needed) {
      *each.buffer = memory;
      memory += buffer_bytes(call.format, each.size);
    }
    if (is_whole) normed = (char*)call.normed;
  }
};

// A step's queries: row by row, head by head, keys' part and then the rotated one.
struct Queries {
  void* data;
  int64_t row_stride, head_stride;
};

void attend_absorbed(const KernelTable& kernels, const MlaLayerCall& call, const MlaSpan& span, const Queries& queries,
                     const Buffers& buffers) {
  const int64_t latent_stride = (int64_t)call.num_heads * call.kv_lora_rank;
  const int64_t out_stride = (int64_t)call.num_heads * call.v_head_dim;
  const void* query = offset(queries.data, call.format, span.start_row * queries.row_stride);
  const HeadsCall absorb = {call.absorb_key, query, buffers.absorbed, queries.row_stride, queries.head_stride,
                            latent_stride, call.kv_lora_rank, call.num_heads, span.num_rows, call.format, call.format};
  kernels.heads(&absorb);
  const MlaDecodeCall decode = {buffers.absorbed, offset(query, call.format, call.qk_nope_dim), call.cache, buffers.latents,
                                call.block_tables, call.sequences + span.start_row, call.context_lens + span.start_row,
                                latent_stride, call.kv_lora_rank, queries.row_stride, queries.head_stride, latent_stride,
                                call.kv_lora_rank, call.cache_row_stride, span.num_rows, call.num_heads, call.kv_lora_rank,
                                call.rope_dim, call.block_size, call.max_num_blocks, call.format, call.cache_format,
                                call.scale};
  kernels.mla_decode(&decode);
  const HeadsCall expand = {call.expand_value, buffers.latents,
                            (void*)offset(buffers.attended, call.format, span.start_row * out_stride), latent_stride,
                            call.kv_lora_rank, out_stride, call.v_head_dim, call.num_heads, span.num_rows, call.format,
                            call.format};
  kernels.heads(&expand);
}

void attend_naive(const KernelTable& kernels, const MlaLayerCall& call, const MlaSpan& span, const Queries& queries,
                  const Buffers& buffers) {
  const int64_t out_stride = (int64_t)call.num_heads * call.v_head_dim;
  const MlaPrefillCall prefill = {offset(queries.data, call.format, span.start_row * queries.row_stride), call.cache,
                                  (void*)offset(buffers.attended, call.format, span.start_row * out_stride),
                                  call.block_tables + (size_t)span.sequence * call.max_num_blocks, call.expand_key,
                                  call.expand_value, queries.row_stride, queries.head_stride, out_stride, call.v_head_dim,
                                  call.cache_row_stride, span.num_rows, call.num_heads,
                                  span.num_context_tokens + span.num_rows, call.kv_lora_rank, call.rope_dim,
                                  call.qk_nope_dim, call.v_head_dim, call.block_size, call.format, call.cache_format,
                                  call.scale};
  kernels.mla_prefill(&prefill);
}

// The rows that are wanted, one after another.
const void* gather(const MlaLayerCall& call, const void* from, char* to, size_t width) {
  const size_t row_bytes = width * element_bytes(call.format);
  for (int i = 0; i < call.num_output_rows; i++)
    memcpy(to + i * row_bytes, (const char*)from + call.output_rows[i] * row_bytes, row_bytes);
  return to;
}

}  // namespace

void mla_layer(const KernelTable& kernels, const MlaLayerCall& call) {
  const int rows = call.num_rows, format = call.format, hidden_size = call.output->num_outputs;
  const int down_width = call.down->num_outputs, head_width = call.qk_nope_dim + call.rope_dim;
  if (rows == 0) return;
  const StayAwake stay_awake;
  const Buffers buffers(call);
  const auto norm = [&](const void* x, int64_t stride, const void* weight, int columns, float eps, int rows, void* out) {
    const NormCall each = {x, weight, out, stride, columns, rows, columns, format, eps};
    kernels.rms_norm(&each);
  };
  const auto linear = [&](const Matrix* matrix, const void* x, const void* residual, int rows, void* out) {
    const LinearCall product = {matrix, x, out, residual, matrix->num_inputs, matrix->num_outputs, rows, format, format};
    kernels.linear(&product);
  };

  norm(call.hidden_states, hidden_size, call.attention_norm, hidden_size, call.norm_eps, rows, buffers.normed);
  linear(call.down, buffers.normed, nullptr, rows, buffers.down);
  Queries queries = {buffers.down, down_width, head_width};
  if (call.query_up) {
    norm(buffers.down, down_width, call.query_norm, call.query_up->num_inputs, call.latent_norm_eps, rows, buffers.low_rank);
    linear(call.query_up, buffers.low_rank, nullptr, rows, buffers.query);
    queries = {buffers.query, call.query_up->num_outputs, head_width};
  }
  const MlaPrepareCall prepare = {offset(buffers.down, format, call.latents_start), call.kv_norm, queries.data, call.cos,
                                  call.sin, call.slot_mapping, call.cache, down_width, queries.row_stride, head_width,
                                  call.cache_row_stride, rows, call.num_heads, call.kv_lora_rank, call.rope_dim,
                                  call.qk_nope_dim, format, call.cache_format, call.latent_norm_eps};
  kernels.mla_prepare(&prepare);
  for (int i = 0; i < call.num_spans; i++)
    (call.spans[i].is_absorbed ? attend_absorbed : attend_naive)(kernels, call, call.spans[i], queries, buffers);
  const void *attended = buffers.attended, *hidden_states = call.hidden_states;
  const int output_rows = call.num_output_rows;
  if (output_rows == 0) return;
  if (output_rows < rows) {
    attended = gather(call, attended, buffers.wanted_attended, call.output->num_inputs);
    hidden_states = gather(call, hidden_states, buffers.wanted_hidden, hidden_size);
  }
  linear(call.output, attended, hidden_states, output_rows, call.out);
  norm(call.out, hidden_size, call.mlp_norm, hidden_size, call.norm_eps, output_rows, call.normed);
}
