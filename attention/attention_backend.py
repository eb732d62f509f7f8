"""What a library of attention kernels has to offer. Knows latents and heads, not projections or rotary positions."""

from typing import Protocol

from torch import Tensor

from attention.latent_cache import LatentCache


class AttentionBackend(Protocol):
    """Both forms of multi-head latent attention. Stateless; results do not depend on what else is computed."""

    def attend_absorbed(
        self, query: Tensor, latent_cache: LatentCache, layer_id: int, block_tables: Tensor, seq_lens: tuple[int, ...]
    ) -> Tensor:
        """Attends to latent rows as they lie in the cache; key and value are the same row, shared by all heads.

        query: [num_seqs, query_len, num_heads, latent_dim], softmax scale applied: the last query_len rows of each
        sequence, each of which sees the context up to itself; block_tables: [num_seqs, max_num_blocks] int32;
        seq_lens: context of each sequence, these rows included.
        Returns [num_seqs, query_len, num_heads, kv_lora_rank] in the query's dtype.
        """
        ...

    def attend_naive(self, query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> tuple[Tensor, Tensor]:
        """Ordinary multi-head attention of one sequence over one piece of its context.

        query: [num_queries, num_heads, qk_head_dim], softmax scale applied; key: [num_keys, num_heads, qk_head_dim];
        value: [num_keys, num_heads, v_head_dim]. is_causal: the last query sees every key, each one before it one
        fewer; otherwise every query sees every key.
        Returns the output [num_queries, num_heads, v_head_dim] fp32 and the log of the softmax's denominator
        [num_queries, num_heads] fp32, with which pieces are merged.
        """
        ...
