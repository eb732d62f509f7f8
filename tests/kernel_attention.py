"""The parts of a layer's attention one by one, for tests and benchmarks; attention/kernel_mla.py calls them together.

Rows are prepared, then generated tokens attend in the absorbed form, prompts in the naive one.

A row's result depends on its query and the tokens it sees, to the bit; not on other rows, threads, block ids or how a
prompt is cut. Activations and cache are float32 or bfloat16, each as it likes. `cache` is one layer's everywhere,
[num_blocks, block_size, row_width], row_width at least kv_lora_rank + qk_rope_head_dim; what stands behind does not
matter. kv_lora_rank, qk_nope_head_dim and qk_rope_head_dim are even, else ValueError is raised; RuntimeError where the
kernels are not built.
"""

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from attention.rotary import Rotation
from experts.kernels.library import format_of, require
from experts.kernels.linear import KernelHeads


class _PrepareCall(ctypes.Structure):
    _fields_ = (
        ("kv", c_void_p),
        ("norm", c_void_p),
        ("query", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("slot_mapping", c_void_p),
        ("cache", c_void_p),
        ("kv_row_stride", c_int64),
        ("query_row_stride", c_int64),
        ("query_head_stride", c_int64),
        ("cache_row_stride", c_int64),
        ("num_rows", c_int32),
        ("num_heads", c_int32),
        ("kv_lora_rank", c_int32),
        ("rope_dim", c_int32),
        ("qk_nope_dim", c_int32),
        ("format", c_int32),
        ("cache_format", c_int32),
        ("eps", c_float),
    )


class _DecodeCall(ctypes.Structure):
    _fields_ = (
        ("query", c_void_p),
        ("query_rope", c_void_p),
        ("cache", c_void_p),
        ("out", c_void_p),
        ("block_tables", c_void_p),
        ("sequences", c_void_p),
        ("context_lens", c_void_p),
        ("query_row_stride", c_int64),
        ("query_head_stride", c_int64),
        ("rope_row_stride", c_int64),
        ("rope_head_stride", c_int64),
        ("out_row_stride", c_int64),
        ("out_head_stride", c_int64),
        ("cache_row_stride", c_int64),
        ("num_rows", c_int32),
        ("num_heads", c_int32),
        ("kv_lora_rank", c_int32),
        ("rope_dim", c_int32),
        ("block_size", c_int32),
        ("max_num_blocks", c_int32),
        ("query_format", c_int32),
        ("cache_format", c_int32),
        ("scale", c_float),
    )


class _PrefillCall(ctypes.Structure):
    _fields_ = (
        ("query", c_void_p),
        ("cache", c_void_p),
        ("out", c_void_p),
        ("block_table", c_void_p),
        ("key_up", c_void_p),
        ("value_up", c_void_p),
        ("query_row_stride", c_int64),
        ("query_head_stride", c_int64),
        ("out_row_stride", c_int64),
        ("out_head_stride", c_int64),
        ("cache_row_stride", c_int64),
        ("num_rows", c_int32),
        ("num_heads", c_int32),
        ("seq_len", c_int32),
        ("kv_lora_rank", c_int32),
        ("rope_dim", c_int32),
        ("qk_nope_dim", c_int32),
        ("v_head_dim", c_int32),
        ("block_size", c_int32),
        ("query_format", c_int32),
        ("cache_format", c_int32),
        ("scale", c_float),
    )


def mla_prepare(
    query: Tensor, kv: Tensor, kv_norm: Tensor, eps: float, rotation: Rotation, slot_mapping: Tensor, cache: Tensor
) -> None:
    """Norms and rotates a step's latents into the cache, rotates its queries in place.

    query: [num_rows, num_heads, qk_head_dim], its last qk_rope_head_dim numbers are modified; kv: [num_rows,
    kv_lora_rank + qk_rope_head_dim] as projected; kv_norm: [kv_lora_rank]; all three of one dtype, rows contiguous;
    slot_mapping: [num_rows] int64, no slot twice.
    """
    rank, rope_dim = kv_norm.shape[0], 2 * rotation.cos.shape[1]
    _check_pairs(kv_lora_rank=rank, qk_head_dim=query.shape[2])
    assert query.dtype == kv.dtype == kv_norm.dtype
    assert query.stride(2) == kv.stride(1) == 1
    assert kv.shape[1] == rank + rope_dim <= cache.shape[2]
    assert kv_norm.is_contiguous()
    assert slot_mapping.dtype == torch.int64
    assert slot_mapping.is_contiguous()
    assert rotation.cos.is_contiguous()
    assert rotation.sin.is_contiguous()
    assert cache.is_contiguous()
    row_stride, head_stride, _ = query.stride()
    call = _PrepareCall(
        kv.data_ptr(), kv_norm.data_ptr(), query.data_ptr(), rotation.cos.data_ptr(), rotation.sin.data_ptr(),
        slot_mapping.data_ptr(), cache.data_ptr(), kv.stride(0), row_stride, head_stride, cache.shape[2],
        query.shape[0], query.shape[1], rank, rope_dim, query.shape[2] - rope_dim, format_of(query.dtype),
        format_of(cache.dtype), eps,
    )  # fmt: skip
    require().mobula_mla_prepare(bytes(call))


def mla_decode(
    query: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    seq_indices: Tensor,
    context_lens: Tensor,
    kv_lora_rank: int,
    scale: float,
) -> Tensor:
    """The absorbed form: every row attends to the latents of the first tokens of its sequence.

    query: [num_rows, num_heads, kv_lora_rank + qk_rope_head_dim], q_c | q_pe, rotated, heads contiguous; block_tables:
    [num_seqs, max_num_blocks] int32; seq_indices: [num_rows] int32, each row's sequence; context_lens: [num_rows]
    int32, tokens that the row sees, 1 or more; scale: of the scores, in fp32. Several rows may be of one sequence. What
    lies behind a row's context does not matter, even if it is NaN. Returns [num_rows, num_heads, kv_lora_rank] in the
    query's dtype.
    """
    num_rows, num_heads, latent_dim = query.shape
    _check_pairs(kv_lora_rank=kv_lora_rank, latent_dim=latent_dim)
    assert kv_lora_rank < latent_dim <= cache.shape[2]
    assert query.stride(2) == block_tables.stride(1) == 1
    assert block_tables.dtype == seq_indices.dtype == context_lens.dtype == torch.int32
    assert seq_indices.is_contiguous()
    assert context_lens.is_contiguous()
    assert len(seq_indices) == len(context_lens) == num_rows
    assert cache.is_contiguous()
    out = torch.empty(num_rows, num_heads, kv_lora_rank, dtype=query.dtype)
    row_stride, head_stride, _ = query.stride()
    rotated = query[..., kv_lora_rank:]
    call = _DecodeCall(
        query.data_ptr(), rotated.data_ptr(), cache.data_ptr(), out.data_ptr(), block_tables.data_ptr(),
        seq_indices.data_ptr(), context_lens.data_ptr(), row_stride, head_stride, row_stride, head_stride,
        num_heads * kv_lora_rank, kv_lora_rank, cache.shape[2],
        num_rows, num_heads, kv_lora_rank, latent_dim - kv_lora_rank, cache.shape[1], block_tables.stride(0),
        format_of(query.dtype), format_of(cache.dtype), scale,
    )  # fmt: skip
    require().mobula_mla_decode(bytes(call))
    return out


def mla_prefill(
    query: Tensor,
    expand_key: KernelHeads,
    expand_value: KernelHeads,
    cache: Tensor,
    block_table: Tensor,
    num_context_tokens: int,
    scale: float,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The naive form: neighbouring rows of one sequence attend causally to the tokens before them and to each other.

    query: [num_rows, num_heads, qk_head_dim], rotated, heads contiguous, of positions num_context_tokens and following;
    their latents are in the cache. expand_key: kv_lora_rank -> qk_nope_head_dim, expand_value: kv_lora_rank ->
    v_head_dim, one matrix a head, float32 or bfloat16; block_table: [max_num_blocks] int32; scale: of the scores, in
    fp32. out: [num_rows, num_heads, v_head_dim] in the query's dtype, heads contiguous, written when given. Returns it.
    Tokens behind these rows do not matter; of these rows one that is not finite may spoil a few before it.
    """
    num_rows, num_heads, qk_head_dim = query.shape
    key_up, value_up = expand_key.weights[0], expand_value.weights[0]
    rank, qk_nope_dim, v_head_dim = key_up.num_inputs, key_up.num_outputs, value_up.num_outputs
    _check_pairs(kv_lora_rank=rank, qk_nope_head_dim=qk_nope_dim, qk_head_dim=qk_head_dim)
    seq_len = num_context_tokens + num_rows
    assert query.stride(2) == 1
    assert block_table.dtype == torch.int32
    assert block_table.is_contiguous()
    assert seq_len <= block_table.shape[0] * cache.shape[1]
    assert num_heads == len(expand_key.weights) == len(expand_value.weights)
    assert cache.is_contiguous()
    if out is None:
        out = torch.empty(num_rows, num_heads, v_head_dim, dtype=query.dtype)
    assert out.dtype == query.dtype
    assert out.shape == (num_rows, num_heads, v_head_dim)
    assert out.stride(2) == 1
    query_row_stride, query_head_stride, _ = query.stride()
    out_row_stride, out_head_stride, _ = out.stride()
    call = _PrefillCall(
        query.data_ptr(), cache.data_ptr(), out.data_ptr(), block_table.data_ptr(), expand_key.address,
        expand_value.address, query_row_stride, query_head_stride, out_row_stride, out_head_stride, cache.shape[2],
        num_rows, num_heads, seq_len, rank, qk_head_dim - qk_nope_dim, qk_nope_dim, v_head_dim, cache.shape[1],
        format_of(query.dtype), format_of(cache.dtype), scale,
    )  # fmt: skip
    require().mobula_mla_prefill(bytes(call))
    return out


def _check_pairs(**sizes: int) -> None:
    """bfloat16 numbers of latents and keys are multiplied two by two."""
    for name, size in sizes.items():
        if size % 2:
            raise ValueError(f"{name} is {size}, the attention kernels need an even number; use the torch backend")
