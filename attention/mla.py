"""Multi-head latent attention of one layer, over a paged latent cache (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Projects, rotates, writes the step's latent rows to the cache, attends in the absorbed or the naive form as the plan
says, projects back. Knows nothing of sequences but their rows, and leaves the attention itself to a backend.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.attention_backend import AttentionBackend
from attention.attention_plan import AbsorbedBatch, AttentionPlan, RowSpan
from attention.latent_cache import LatentCache
from attention.layers import BlockNorms, WeightTarget, rms_norm
from attention.mla_config import MlaConfig
from attention.rotary import Rotation

CONTEXT_TOKENS_PER_PIECE = 1024  # context tokens expanded into keys and values at once in the naive form


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryLora:
    """The low-rank step of the query projection; V2-Lite has none."""

    down: Tensor  # [q_lora_rank, hidden_size], q_a_proj
    norm: Tensor  # [q_lora_rank], q_a_layernorm


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaWeights:
    """One layer's. kv_b_proj is split once, here, into what absorption needs."""

    query_lora: QueryLora | None
    query: Tensor  # [num_heads * qk_head_dim, q_lora_rank or hidden_size], q_b_proj or q_proj
    kv_down: Tensor  # [kv_lora_rank + qk_rope_head_dim, hidden_size], kv_a_proj_with_mqa
    kv_norm: Tensor  # [kv_lora_rank], kv_a_layernorm
    key_up: Tensor  # [num_heads, qk_nope_head_dim, kv_lora_rank], W_UK
    value_up: Tensor  # [num_heads, v_head_dim, kv_lora_rank], W_UV
    output: Tensor  # [hidden_size, num_heads * v_head_dim], o_proj

    @classmethod
    def read(cls, target: WeightTarget, prefix: str, config: MlaConfig) -> "MlaWeights":
        """prefix: "model.layers.0.self_attn"."""
        query_lora = None
        if config.q_lora_rank is not None:
            query_lora = QueryLora(
                down=target.read(f"{prefix}.q_a_proj.weight"), norm=target.read(f"{prefix}.q_a_layernorm.weight")
            )
        kv_up = target.read(f"{prefix}.kv_b_proj.weight").view(
            config.num_attention_heads, config.qk_nope_head_dim + config.v_head_dim, config.kv_lora_rank
        )  # per head: keys, then values
        return cls(
            query_lora=query_lora,
            query=target.read(f"{prefix}.q_proj.weight" if query_lora is None else f"{prefix}.q_b_proj.weight"),
            kv_down=target.read(f"{prefix}.kv_a_proj_with_mqa.weight"),
            kv_norm=target.read(f"{prefix}.kv_a_layernorm.weight"),
            key_up=kv_up[:, : config.qk_nope_head_dim].contiguous(),
            value_up=kv_up[:, config.qk_nope_head_dim :].contiguous(),
            output=target.read(f"{prefix}.o_proj.weight"),
        )


class Mla:
    """One layer's attention with the norms before and after it."""

    def __init__(
        self,
        config: MlaConfig,
        weights: MlaWeights,
        norms: BlockNorms,
        softmax_scale: float,
        backend: AttentionBackend,
        latent_cache: LatentCache,
        layer_id: int,
    ) -> None:
        self._config = config
        self._weights = weights
        self._norms = norms
        self._softmax_scale = softmax_scale
        self._backend = backend
        self._latent_cache = latent_cache
        self._layer_id = layer_id

    def forward(self, hidden_states: Tensor, rotation: Rotation, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
        """See attention.decoder.AttentionBlock."""
        norms = self._norms
        normed = rms_norm(hidden_states, norms.attention, norms.eps)
        attended = self._attend(normed, rotation, plan)
        if plan.output_rows is not None:
            hidden_states, attended = hidden_states[plan.output_rows], attended[plan.output_rows]
        hidden_states = hidden_states + F.linear(attended.flatten(1), self._weights.output)
        return hidden_states, rms_norm(hidden_states, norms.mlp, norms.eps)

    def _attend(self, hidden_states: Tensor, rotation: Rotation, plan: AttentionPlan) -> Tensor:
        """Writes the rows' latents to the cache, then attends. hidden_states: [num_tokens, hidden_size], normed.

        Returns [num_tokens, num_heads, v_head_dim]; rows that are in no span have no values.
        """
        kv_c, k_pe = F.linear(hidden_states, self._weights.kv_down).split(
            [self._config.kv_lora_rank, self._config.qk_rope_head_dim], dim=-1
        )
        kv_c = rms_norm(kv_c, self._weights.kv_norm, self._config.latent_norm_eps)
        self._latent_cache.write(self._layer_id, plan.metadata.slot_mapping, kv_c, rotation.apply(k_pe))

        query = self._project_query(hidden_states)  # [num_tokens, num_heads, qk_head_dim]
        q_nope, q_pe = query.split([self._config.qk_nope_head_dim, self._config.qk_rope_head_dim], dim=-1)
        q_pe = rotation.apply(q_pe)
        attended: Tensor = q_nope.new_empty(query.shape[0], self._config.num_attention_heads, self._config.v_head_dim)
        for batch in plan.absorbed_batches:
            attended[batch.rows] = self._attend_absorbed(q_nope[batch.rows], q_pe[batch.rows], batch)
        for span in plan.naive:
            rows = slice(span.start_row, span.end_row)
            block_table = plan.metadata.block_tables[span.seq_index]
            attended[rows] = self._attend_naive(q_nope[rows], q_pe[rows], span, block_table)
        return attended

    def _project_query(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states
        if self._weights.query_lora is not None:
            x = F.linear(x, self._weights.query_lora.down)
            x = rms_norm(x, self._weights.query_lora.norm, self._config.latent_norm_eps)
        return F.linear(x, self._weights.query).view(-1, self._config.num_attention_heads, self._config.qk_head_dim)

    def _attend_absorbed(self, q_nope: Tensor, q_pe: Tensor, batch: AbsorbedBatch) -> Tensor:
        """q_nope: [rows, num_heads, nope]; q_pe: [rows, num_heads, rope]. Returns [rows, num_heads, v_head_dim]."""
        q_c = (q_nope.transpose(0, 1) @ self._weights.key_up).transpose(0, 1)
        query = torch.cat((q_c, q_pe), dim=-1).float() * self._softmax_scale  # [rows, num_heads, latent_dim]
        latents = self._backend.attend_absorbed(
            query.unflatten(0, (-1, batch.query_len)),
            self._latent_cache,
            self._layer_id,
            batch.block_tables,
            batch.seq_lens,
        ).flatten(0, 1)  # [rows, num_heads, kv_lora_rank]
        latents = latents.to(q_nope.dtype).transpose(0, 1)
        return (latents @ self._weights.value_up.transpose(1, 2)).transpose(0, 1)

    def _attend_naive(self, q_nope: Tensor, q_pe: Tensor, span: RowSpan, block_table: Tensor) -> Tensor:
        """q_nope: [rows, num_heads, nope]; q_pe: [rows, num_heads, rope]. Returns [rows, num_heads, v_head_dim]."""
        query = torch.cat((q_nope, q_pe), dim=-1).float() * self._softmax_scale
        key, value = self._expand(block_table, span.num_context_tokens, span.seq_len)
        output, log_denominator = self._backend.attend_naive(query, key, value, is_causal=True)
        for start in range(0, span.num_context_tokens, CONTEXT_TOKENS_PER_PIECE):
            end = min(start + CONTEXT_TOKENS_PER_PIECE, span.num_context_tokens)
            key, value = self._expand(block_table, start, end)
            piece, piece_log_denominator = self._backend.attend_naive(query, key, value, is_causal=False)
            merged = torch.logaddexp(log_denominator, piece_log_denominator)  # [rows, num_heads]
            output = output * (log_denominator - merged).exp().unsqueeze(-1)
            output += piece * (piece_log_denominator - merged).exp().unsqueeze(-1)
            log_denominator = merged
        return output.to(q_nope.dtype)

    def _expand(self, block_table: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys [end - start, num_heads, qk_head_dim] and values [end - start, num_heads, v_head_dim] from the cache."""
        block_size = self._latent_cache.config.block_size
        first_block = start // block_size
        block_ids = block_table[first_block : -(-end // block_size)]
        latents = self._latent_cache.gather(self._layer_id, block_ids)[start - first_block * block_size :][
            : end - start
        ]
        kv_c, k_pe = latents.to(self._weights.key_up.dtype).split(
            [self._config.kv_lora_rank, self._config.qk_rope_head_dim], dim=-1
        )
        heads = self._config.num_attention_heads
        k_nope = F.linear(kv_c, self._weights.key_up.flatten(0, 1)).unflatten(-1, (heads, -1))
        value = F.linear(kv_c, self._weights.value_up.flatten(0, 1)).unflatten(-1, (heads, -1))
        return torch.cat((k_nope, k_pe.unsqueeze(1).expand(-1, heads, -1)), dim=-1), value
