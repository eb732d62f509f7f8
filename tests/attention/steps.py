"""Runs a decoder step by step over sequences whose blocks lie anywhere in the cache."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from attention.attention_metadata import AttentionMetadata
from attention.decoder import Decoder, DecoderConfig, DecoderWeights
from attention.latent_cache import LatentCache, LatentCacheConfig
from attention.mla_form import MlaForm
from cluster.checkpoint.checkpoint import Checkpoint
from tests.fakes import LocalExperts

BLOCK_SIZE = 16


@dataclass
class Rows:
    """One sequence of a test: all its tokens, and how many of them are in the cache."""

    token_ids: list[int]
    block_ids: list[int]
    num_prompt_tokens: int
    num_computed_tokens: int = 0
    logits: list[Tensor] = field(default_factory=list)


class StepRunner:
    """A decoder over a checkpoint, with experts in this process."""

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype = torch.float32,
        form: MlaForm = MlaForm.BY_POSITION,
        num_blocks: int = 256,
        num_micro_batches: int | None = 1,
        needs_every_choice: bool = False,
        seed: int = 0,
    ) -> None:
        checkpoint = Checkpoint.open(folder)
        self.config = checkpoint.model_config().decoder
        self.cache = LatentCache(cache_config(self.config, num_blocks, dtype))
        self.experts = LocalExperts(checkpoint, self.config, dtype)
        self.decoder = Decoder(
            self.config,
            DecoderWeights.read(checkpoint, self.config, dtype),
            self.experts,
            self.cache,
            mla_form=form,
            num_micro_batches=num_micro_batches,
            begin_step=lambda: needs_every_choice,
        )
        self._free = list(range(num_blocks))
        random.Random(seed).shuffle(self._free)

    def sequence(self, token_ids: list[int], num_prompt_tokens: int | None = None) -> Rows:
        """num_prompt_tokens: all if unset; the rest count as generated."""
        num_blocks = -(-len(token_ids) // BLOCK_SIZE)
        taken, self._free = self._free[:num_blocks], self._free[num_blocks:]
        return Rows(token_ids, taken, len(token_ids) if num_prompt_tokens is None else num_prompt_tokens)

    def step(
        self,
        rows: list[tuple[Rows, int]],
        *,
        output_rows: list[int] | None = None,
        on_begun: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Runs the next tokens of each sequence, as many as said; their logits are kept with the sequence.

        output_rows: those of the step whose logits are returned, and then none are kept; unset: all.
        """
        token_ids, positions, slots, loc = [], [], [], [0]
        for sequence, num_tokens in rows:
            start = sequence.num_computed_tokens
            sequence.num_computed_tokens += num_tokens
            for position in range(start, start + num_tokens):
                token_ids.append(sequence.token_ids[position])
                positions.append(position)
                slots.append(sequence.block_ids[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
            loc.append(len(token_ids))
        width = max(len(sequence.block_ids) for sequence, _ in rows)
        tables = [sequence.block_ids + [0] * (width - len(sequence.block_ids)) for sequence, _ in rows]
        metadata = AttentionMetadata(
            positions=torch.tensor(positions),
            slot_mapping=torch.tensor(slots),
            query_start_loc=tuple(loc),
            seq_lens=tuple(sequence.num_computed_tokens for sequence, _ in rows),
            num_prompt_tokens=tuple(sequence.num_prompt_tokens for sequence, _ in rows),
            block_tables=torch.tensor(tables, dtype=torch.int32),
        )
        logits = self.decoder.logits(self.decoder.forward(torch.tensor(token_ids), metadata, output_rows, on_begun))
        if output_rows is None:
            for (sequence, _), start, end in zip(rows, loc[:-1], loc[1:], strict=True):
                sequence.logits.append(logits[start:end])
        return logits


def cache_config(config: DecoderConfig, num_blocks: int, dtype: torch.dtype) -> LatentCacheConfig:
    return LatentCacheConfig(
        num_layers=config.num_hidden_layers,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        kv_lora_rank=config.mla.kv_lora_rank,
        qk_rope_head_dim=config.mla.qk_rope_head_dim,
        dtype=dtype,
    )


def random_token_ids(num_tokens: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 320, (num_tokens,), generator=generator).tolist()


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())
