"""Attention in plain torch, for any device. The arithmetic is fp32 whatever the cache holds.

Context is walked in tiles at fixed places, so that memory is bounded for any length and a sequence's result does not
depend, to the bit, on how long the others in its batch are.
"""

import torch
from torch import Tensor

from attention.latent_cache import LatentCache

TILE_TOKENS = 256  # context tokens a step of the online softmax
QUERIES_PER_PASS = 64  # rows of a naive query whose scores are in memory at once


class TorchBackend:
    """Implements AttentionBackend."""

    def attend_absorbed(
        self, query: Tensor, latent_cache: LatentCache, layer_id: int, block_tables: Tensor, seq_lens: tuple[int, ...]
    ) -> Tensor:
        num_seqs, query_len = query.shape[:2]
        softmax = _OnlineSoftmax(query, latent_cache.config.kv_lora_rank)
        blocks_per_tile = max(1, TILE_TOKENS // latent_cache.config.block_size)
        tile_tokens = blocks_per_tile * latent_cache.config.block_size
        block_tables = _padded_to_multiple(block_tables, blocks_per_tile)
        lengths = torch.tensor(seq_lens, device=query.device)
        for tile in range(-(-max(seq_lens) // tile_tokens)):
            start, end = tile * tile_tokens, (tile + 1) * tile_tokens
            seqs = torch.tensor([i for i in range(num_seqs) if seq_lens[i] > start], device=query.device)
            tile_ids = block_tables[seqs, tile * blocks_per_tile : (tile + 1) * blocks_per_tile]
            latents = latent_cache.gather(layer_id, tile_ids).float()  # [len(seqs), tile_tokens, latent_dim]
            is_hidden = None
            if any(start < seq_len < end + query_len - 1 for seq_len in seq_lens):
                positions = torch.arange(start, end, device=query.device)
                # What lies behind a sequence's end may belong to another: a NaN there times a zero weight is a NaN.
                latents.masked_fill_((positions >= lengths[seqs, None]).unsqueeze(-1), 0.0)
                last_seen = lengths[seqs, None] + torch.arange(-query_len, 0, device=query.device)
                is_hidden = positions > last_seen.unsqueeze(-1)  # [len(seqs), query_len, tile_tokens]
            softmax.add(seqs, latents, is_hidden)
        return softmax.result().to(query.dtype)

    def attend_naive(self, query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> tuple[Tensor, Tensor]:
        num_queries, num_keys = query.shape[0], key.shape[0]
        keys = key.float().permute(1, 2, 0)  # [num_heads, qk_head_dim, num_keys]
        values = value.float().transpose(0, 1)  # [num_heads, num_keys, v_head_dim]
        output = query.new_empty(num_queries, query.shape[1], value.shape[2], dtype=torch.float32)
        log_denominator = query.new_empty(num_queries, query.shape[1], dtype=torch.float32)
        for start in range(0, num_queries, QUERIES_PER_PASS):
            end = min(start + QUERIES_PER_PASS, num_queries)
            num_seen = num_keys - (num_queries - end) if is_causal else num_keys
            scores = query[start:end].float().transpose(0, 1) @ keys[..., :num_seen]  # [num_heads, rows, num_seen]
            if is_causal:
                last_seen = torch.arange(num_seen - (end - start), num_seen, device=query.device)
                is_hidden = torch.arange(num_seen, device=query.device) > last_seen.unsqueeze(-1)  # [rows, num_seen]
                scores.masked_fill_(is_hidden, float("-inf"))
            log_denominator[start:end] = scores.logsumexp(dim=-1).T
            output[start:end] = (scores.softmax(dim=-1) @ values[:, :num_seen]).transpose(0, 1)
        return output, log_denominator


class _OnlineSoftmax:
    """Running softmax(query @ latents.T) @ latents over tiles; arXiv 1805.02867. All state is fp32."""

    def __init__(self, query: Tensor, kv_lora_rank: int) -> None:
        """query: [num_seqs, query_len, num_heads, latent_dim]."""
        self._shape = query.shape
        self._kv_lora_rank = kv_lora_rank
        self._query = query.float().flatten(1, 2)  # [num_seqs, rows, latent_dim]
        self._maximum = self._query.new_full(self._query.shape[:2], float("-inf"))
        self._denominator = torch.zeros_like(self._maximum)
        self._numerator = self._query.new_zeros(*self._query.shape[:2], kv_lora_rank)

    def add(self, seqs: Tensor, latents: Tensor, is_hidden: Tensor | None) -> None:
        """Takes in one tile of the sequences named. The first tile must show every row at least one token.

        seqs: [n] int64; latents: [n, tile_tokens, latent_dim] fp32; is_hidden: [n, query_len, tile_tokens] bool.
        """
        scores = self._query[seqs] @ latents.transpose(1, 2)  # [n, rows, tile_tokens]
        if is_hidden is not None:
            scores.masked_fill_(is_hidden.repeat_interleave(self._shape[2], dim=1), float("-inf"))
        maximum = torch.maximum(self._maximum[seqs], scores.amax(dim=-1))
        weights = (scores - maximum.unsqueeze(-1)).exp_()
        decay = (self._maximum[seqs] - maximum).exp_()
        self._denominator[seqs] = self._denominator[seqs] * decay + weights.sum(dim=-1)
        added = weights @ latents[..., : self._kv_lora_rank]  # [n, rows, kv_lora_rank]
        self._numerator[seqs] = self._numerator[seqs] * decay.unsqueeze(-1) + added
        self._maximum[seqs] = maximum

    def result(self) -> Tensor:
        """[num_seqs, query_len, num_heads, kv_lora_rank]."""
        output = self._numerator / self._denominator.unsqueeze(-1)
        return output.view(*self._shape[:3], self._kv_lora_rank)


def _padded_to_multiple(block_tables: Tensor, blocks_per_tile: int) -> Tensor:
    missing = -block_tables.shape[1] % blocks_per_tile
    return torch.nn.functional.pad(block_tables, (0, missing))
