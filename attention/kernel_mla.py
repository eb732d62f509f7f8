"""Multi-head latent attention of one layer by the CPU kernels; the same mathematics as mla.py, which explains it.

A layer of one step, in one call of experts/kernels/native/mla_layer.cpp:
1. norm; one product gives the queries (or their low rank) and the latents of all rows;
2. latents are normed, rotated and written to the cache, queries rotated;
3. generated rows attend in the absorbed form straight from the cache, prompt rows in the naive form, span by span;
4. one product brings the heads back, with the residual; norm.
Every step's result for a row depends on that row and its context alone, to the bit: not on other rows, threads, block
ids or how a prompt is cut.
"""

import ctypes
import struct
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from attention.attention_plan import AttentionPlan
from attention.latent_cache import LatentCache
from attention.layers import BlockNorms, WeightTarget
from attention.mla_config import MlaConfig
from attention.rotary import Rotation
from experts.kernels.library import format_of, require
from experts.kernels.linear import KernelHeads, KernelLinear
from experts.kernels.packed_matrix import PANEL_OUTPUTS, pack_plain


def odd_sizes(config: MlaConfig) -> dict[str, int]:
    """Those, by name, that keep attention from the kernels: numbers are multiplied in pairs. torch takes any."""
    sizes = {
        "hidden_size": config.hidden_size,
        "q_lora_rank": config.q_lora_rank or 0,
        "kv_lora_rank": config.kv_lora_rank,
        "num_attention_heads x v_head_dim": config.num_attention_heads * config.v_head_dim,
        "qk_nope_head_dim": config.qk_nope_head_dim,
        "qk_rope_head_dim": config.qk_rope_head_dim,
    }
    return {name: size for name, size in sizes.items() if size % 2}


def can_use_kernels(config: MlaConfig) -> bool:
    """Whether the kernels take every matrix of these sizes."""
    return not odd_sizes(config)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelMlaWeights:
    """One layer's, packed. W_UK is held twice: to absorb it into queries, and to expand latents into keys."""

    down: KernelLinear  # q_a_proj (or q_proj) over kv_a_proj_with_mqa
    query_norm: Tensor | None  # [q_lora_rank], q_a_layernorm; None where queries are projected in one step
    query_up: KernelLinear | None  # q_b_proj
    kv_norm: Tensor  # [kv_lora_rank], kv_a_layernorm
    absorb_key: KernelHeads  # qk_nope_head_dim -> kv_lora_rank, W_UK transposed
    expand_key: KernelHeads  # kv_lora_rank -> qk_nope_head_dim, W_UK
    expand_value: KernelHeads  # kv_lora_rank -> v_head_dim, W_UV
    output: KernelLinear  # o_proj

    @classmethod
    def read(cls, target: WeightTarget, prefix: str, config: MlaConfig) -> "KernelMlaWeights":
        """prefix: "model.layers.0.self_attn"."""
        has_lora = config.q_lora_rank is not None
        kv_up = target.read(f"{prefix}.kv_b_proj.weight").view(
            config.num_attention_heads, config.qk_nope_head_dim + config.v_head_dim, config.kv_lora_rank
        )  # per head: keys, then values
        keys, values = kv_up.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        query_name = "q_a_proj" if has_lora else "q_proj"
        return cls(
            down=target.kernel_projection(f"{prefix}.{query_name}.weight", f"{prefix}.kv_a_proj_with_mqa.weight"),
            query_norm=target.read(f"{prefix}.q_a_layernorm.weight") if has_lora else None,
            query_up=target.kernel_projection(f"{prefix}.q_b_proj.weight") if has_lora else None,
            kv_norm=target.read(f"{prefix}.kv_a_layernorm.weight"),
            absorb_key=KernelHeads([pack_plain([head.T]) for head in keys]),
            expand_key=KernelHeads([pack_plain([head]) for head in keys]),
            expand_value=KernelHeads([pack_plain([head]) for head in values]),
            output=target.kernel_projection(f"{prefix}.o_proj.weight"),
        )


_ROWS = struct.Struct("5P")  # struct MlaRows in native/kernels.h


class _Layer(ctypes.Structure):
    """struct MlaLayer in native/kernels.h."""

    _fields_ = (
        ("attention_norm", c_void_p),
        ("down", c_void_p),
        ("query_norm", c_void_p),
        ("query_up", c_void_p),
        ("kv_norm", c_void_p),
        ("absorb_key", c_void_p),
        ("expand_key", c_void_p),
        ("expand_value", c_void_p),
        ("output", c_void_p),
        ("mlp_norm", c_void_p),
        ("cache", c_void_p),
        ("cache_row_stride", c_int64),
        ("latents_start", c_int32),
        ("num_heads", c_int32),
        ("kv_lora_rank", c_int32),
        ("rope_dim", c_int32),
        ("qk_nope_dim", c_int32),
        ("v_head_dim", c_int32),
        ("block_size", c_int32),
        ("format", c_int32),
        ("cache_format", c_int32),
        ("norm_eps", c_float),
        ("latent_norm_eps", c_float),
        ("scale", c_float),
    )


class KernelMla:
    """One layer's attention with the norms before and after it. Belongs to one thread."""

    def __init__(
        self,
        config: MlaConfig,
        weights: KernelMlaWeights,
        norms: BlockNorms,
        softmax_scale: float,
        latent_cache: LatentCache,
        layer_id: int,
    ) -> None:
        query_width = config.q_lora_rank or config.num_attention_heads * config.qk_head_dim
        self._kept = (weights, norms, latent_cache)  # their memory
        self._dtype = norms.attention.dtype
        cache = latent_cache.tensor[layer_id]  # [num_blocks, block_size, row_width]
        every_norm = (norms.attention, norms.mlp, weights.kv_norm, weights.query_norm)
        assert {norm.dtype for norm in every_norm if norm is not None} == {self._dtype}
        assert cache.is_contiguous()
        self._layer = _Layer(
            attention_norm=norms.attention.data_ptr(),
            down=weights.down.address,
            query_norm=None if weights.query_norm is None else weights.query_norm.data_ptr(),
            query_up=None if weights.query_up is None else weights.query_up.address,
            kv_norm=weights.kv_norm.data_ptr(),
            absorb_key=weights.absorb_key.address,
            expand_key=weights.expand_key.address,
            expand_value=weights.expand_value.address,
            output=weights.output.address,
            mlp_norm=norms.mlp.data_ptr(),
            cache=cache.data_ptr(),
            cache_row_stride=cache.shape[2],
            latents_start=-(-query_width // PANEL_OUTPUTS) * PANEL_OUTPUTS,  # the second part of `down`
            num_heads=config.num_attention_heads,
            kv_lora_rank=config.kv_lora_rank,
            rope_dim=config.qk_rope_head_dim,
            qk_nope_dim=config.qk_nope_head_dim,
            v_head_dim=config.v_head_dim,
            block_size=cache.shape[1],
            format=format_of(self._dtype),
            cache_format=format_of(cache.dtype),
            norm_eps=norms.eps,
            latent_norm_eps=config.latent_norm_eps,
            scale=softmax_scale,
        )
        self._address = ctypes.addressof(self._layer)
        self._function = require().mobula_mla_layer

    def forward(self, hidden_states: Tensor, rotation: Rotation, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
        """See attention.decoder.AttentionBlock."""
        assert hidden_states.dtype == self._dtype
        assert hidden_states.is_contiguous()
        num_rows, hidden_size = hidden_states.shape
        assert num_rows == plan.metadata.num_tokens
        shape = (num_rows if plan.output_rows is None else len(plan.output_rows), hidden_size)
        out, normed = torch.empty(shape, dtype=self._dtype), torch.empty(shape, dtype=self._dtype)
        rows = _ROWS.pack(
            rotation.cos.data_ptr(),
            rotation.sin.data_ptr(),
            hidden_states.data_ptr(),
            out.data_ptr(),
            normed.data_ptr(),
        )
        self._function(self._address, plan.kernel_rows.step, rows)
        return out, normed
