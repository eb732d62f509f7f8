"""Multi-head latent attention of one layer by the CPU kernels; the same mathematics as mla.py, which explains it.

A layer of one step:
1. one product gives the queries (or their low rank) and the latents of all rows;
2. latents are normed, rotated and written to the cache, queries rotated;
3. generated rows attend in the absorbed form straight from the cache, prompt rows in the naive form, span by span;
4. one product brings the heads back, with the residual.
Every step's result for a row depends on that row and its context alone, to the bit.
"""

from dataclasses import dataclass

from torch import Tensor

from attention.attention_plan import AbsorbedRows, AttentionPlan
from attention.kernel_attention import mla_decode, mla_prefill, mla_prepare
from attention.latent_cache import LatentCache
from attention.layers import Projection, WeightTarget, rms_norm
from attention.mla_config import MlaConfig
from attention.rotary import Rotation
from experts.kernels.linear import KernelHeads
from experts.kernels.packed_matrix import PANEL_OUTPUTS, pack_plain


def can_use_kernels(config: MlaConfig) -> bool:
    """Whether the kernels take every matrix of these sizes: numbers are multiplied in pairs. torch takes any."""
    sizes = (
        config.hidden_size,
        config.q_lora_rank or 0,
        config.kv_lora_rank,
        config.num_attention_heads * config.v_head_dim,
    )
    return all(size % 2 == 0 for size in (*sizes, config.qk_nope_head_dim, config.qk_rope_head_dim))


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelMlaWeights:
    """One layer's, packed. W_UK is held twice: to absorb it into queries, and to expand latents into keys."""

    down: Projection  # q_a_proj (or q_proj) over kv_a_proj_with_mqa
    query_norm: Tensor | None  # [q_lora_rank], q_a_layernorm; None where queries are projected in one step
    query_up: Projection | None  # q_b_proj
    kv_norm: Tensor  # [kv_lora_rank], kv_a_layernorm
    absorb_key: KernelHeads  # qk_nope_head_dim -> kv_lora_rank, W_UK transposed
    expand_key: KernelHeads  # kv_lora_rank -> qk_nope_head_dim, W_UK
    expand_value: KernelHeads  # kv_lora_rank -> v_head_dim, W_UV
    output: Projection  # o_proj

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
            down=target.projection(f"{prefix}.{query_name}.weight", f"{prefix}.kv_a_proj_with_mqa.weight"),
            query_norm=target.read(f"{prefix}.q_a_layernorm.weight") if has_lora else None,
            query_up=target.projection(f"{prefix}.q_b_proj.weight") if has_lora else None,
            kv_norm=target.read(f"{prefix}.kv_a_layernorm.weight"),
            absorb_key=KernelHeads([pack_plain([head.T]) for head in keys]),
            expand_key=KernelHeads([pack_plain([head]) for head in keys]),
            expand_value=KernelHeads([pack_plain([head]) for head in values]),
            output=target.projection(f"{prefix}.o_proj.weight"),
        )


class KernelMla:
    """One layer's attention."""

    def __init__(
        self,
        config: MlaConfig,
        weights: KernelMlaWeights,
        softmax_scale: float,
        latent_cache: LatentCache,
        layer_id: int,
    ) -> None:
        self._config = config
        self._weights = weights
        self._softmax_scale = softmax_scale
        self._cache = latent_cache.tensor[layer_id]  # [num_blocks, block_size, row_width]
        self._query_width = config.q_lora_rank or config.num_attention_heads * config.qk_head_dim
        self._latents_start = -(-self._query_width // PANEL_OUTPUTS) * PANEL_OUTPUTS  # the second part of `down`

    def forward(self, hidden_states: Tensor, rotation: Rotation, plan: AttentionPlan, residual: Tensor) -> Tensor:
        """Writes the rows' latents to the cache, then attends.

        hidden_states: [num_tokens, hidden_size], normed; residual: the same shape, added to the result.
        """
        config, weights, metadata = self._config, self._weights, plan.metadata
        down = weights.down(hidden_states)
        query = down[:, : self._query_width]
        if weights.query_up is not None and weights.query_norm is not None:
            query = weights.query_up(rms_norm(query, weights.query_norm, config.latent_norm_eps))
        query = query.unflatten(1, (config.num_attention_heads, config.qk_head_dim))
        mla_prepare(
            query,
            down[:, self._latents_start :],
            weights.kv_norm,
            config.latent_norm_eps,
            rotation,
            metadata.slot_mapping,
            self._cache,
        )
        attended = hidden_states.new_empty(len(hidden_states), config.num_attention_heads, config.v_head_dim)
        if plan.absorbed_rows is not None:
            self._attend_absorbed(query, plan.absorbed_rows, metadata.block_tables, attended)
        for span in plan.naive:
            rows = slice(span.start_row, span.end_row)
            block_table = metadata.block_tables[span.seq_index]
            mla_prefill(
                query[rows],
                weights.expand_key,
                weights.expand_value,
                self._cache,
                block_table,
                span.num_context_tokens,
                self._softmax_scale,
                out=attended[rows],
            )
        return weights.output(attended.flatten(1), residual=residual)

    def _attend_absorbed(self, query: Tensor, absorbed: AbsorbedRows, block_tables: Tensor, attended: Tensor) -> None:
        """Writes the rows of `attended`, [num_tokens, num_heads, v_head_dim]."""
        config = self._config
        mine = query[absorbed.rows]
        absorbed_query = mine.new_empty(len(mine), config.num_attention_heads, config.latent_dim)
        self._weights.absorb_key(mine[..., : config.qk_nope_head_dim], out=absorbed_query[..., : config.kv_lora_rank])
        absorbed_query[..., config.kv_lora_rank :] = mine[..., config.qk_nope_head_dim :]
        latents = mla_decode(
            absorbed_query,
            self._cache,
            block_tables,
            absorbed.seq_indices,
            absorbed.context_lens,
            config.kv_lora_rank,
            self._softmax_scale,
        )
        if isinstance(absorbed.rows, slice):
            self._weights.expand_value(latents, out=attended[absorbed.rows])
        else:
            attended[absorbed.rows] = self._weights.expand_value(latents)
