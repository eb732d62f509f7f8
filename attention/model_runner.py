"""One step: a scheduled batch becomes tensors, hidden states, and a sampled token for each sequence that needs one.

Knows nothing of requests, blocks' ownership or threads. The engine thread calls it.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from attention.attention_metadata import AttentionMetadata
from attention.sampler import SampledToken, SampleRow, sample
from attention.scheduler import ScheduledBatch, ScheduledSequence


class Decoder(Protocol):
    """The part of attention.decoder.Decoder that is needed here; tests have one whose answers are known."""

    def forward(
        self,
        token_ids: Tensor,
        metadata: AttentionMetadata,
        output_rows: list[int] | None = None,
        on_begun: Callable[[], None] = ...,
    ) -> Tensor:
        """Writes the latent cache. token_ids: [num_tokens] int64; output_rows: those wanted, ascending; unset: all.

        on_begun: called as the layers begin. Returns [len(output_rows), hidden_size].
        """

    def logits(self, hidden_states: Tensor) -> Tensor:
        """hidden_states: [n, hidden_size]. Returns [n, vocab_size] fp32."""

    @property
    def num_dropped(self) -> Tensor | None:
        """Of each row of the newest forward, the assignments that were left out: [num_tokens] int64; None for none."""


class ModelRunner:
    """Runs batches on one decoder."""

    def __init__(self, decoder: Decoder, *, block_size: int, device: torch.device | str = "cpu") -> None:
        """block_size: tokens, as the decoder's latent cache has it."""
        self._decoder = decoder
        self._block_size = block_size
        self._device = torch.device(device)

    @torch.inference_mode()
    def run(self, batch: ScheduledBatch, on_begun: Callable[[], None] = lambda: None) -> list[SampledToken | None]:
        """One entry a sequence of the batch, None for those whose last known token was not reached.

        on_begun: called as the layers begin: from then on almost all time is the kernels', which hold no lock.
        Raises whatever the decoder raises; then nothing of the step counts.
        """
        metadata = attention_metadata(batch, self._block_size, self._device)
        indices = [i for i, scheduled in enumerate(batch.sequences) if scheduled.needs_sample]
        last_rows = [metadata.query_start_loc[i + 1] - 1 for i in indices]
        hidden_states = self._decoder.forward(_token_ids(batch).to(self._device), metadata, last_rows, on_begun)
        if self._decoder.num_dropped is not None:
            _charge(batch, self._decoder.num_dropped, metadata.query_start_loc)
        sampled: list[SampledToken | None] = [None] * len(batch.sequences)
        if not indices:
            return sampled
        logits = self._decoder.logits(hidden_states)  # [len(indices), vocab_size]
        for i, token in zip(indices, sample(logits, [_sample_row(batch.sequences[i]) for i in indices]), strict=True):
            sampled[i] = token
        return sampled


def attention_metadata(batch: ScheduledBatch, block_size: int, device: torch.device) -> AttentionMetadata:
    """The batch's rows, sequence by sequence in the batch's order."""
    positions: list[int] = []
    slots: list[int] = []
    query_start_loc = [0]
    for scheduled in batch.sequences:
        block_table = scheduled.block_table
        mine = range(scheduled.sequence.num_computed_tokens, scheduled.seq_len)
        positions += mine
        slots += [block_table[position // block_size] * block_size + position % block_size for position in mine]
        query_start_loc.append(len(positions))
    return AttentionMetadata(
        positions=torch.tensor(positions, device=device),
        slot_mapping=torch.tensor(slots, device=device),
        query_start_loc=tuple(query_start_loc),
        seq_lens=tuple(scheduled.seq_len for scheduled in batch.sequences),
        num_prompt_tokens=tuple(scheduled.sequence.num_prompt_tokens for scheduled in batch.sequences),
        block_tables=_block_tables(batch, block_size).to(device),
    )


def _charge(batch: ScheduledBatch, num_dropped: Tensor, query_start_loc: tuple[int, ...]) -> None:
    """Tells each sequence how many of its rows' assignments were left out."""
    until = [0, *num_dropped.cumsum(0).tolist()]
    for scheduled, (start, end) in zip(batch.sequences, pairwise(query_start_loc), strict=True):
        scheduled.sequence.num_dropped_assignments += until[end] - until[start]


def _block_tables(batch: ScheduledBatch, block_size: int) -> Tensor:
    """[num_seqs, max_num_blocks] int32: the blocks that hold context in this step, padded with 0."""
    used = [scheduled.block_table[: -(-scheduled.seq_len // block_size)] for scheduled in batch.sequences]
    width = max(len(block_table) for block_table in used)
    return torch.tensor([[*table, *([0] * (width - len(table)))] for table in used], dtype=torch.int32)


def _token_ids(batch: ScheduledBatch) -> Tensor:
    token_ids: list[int] = []
    for scheduled in batch.sequences:
        token_ids += scheduled.sequence.token_ids(scheduled.sequence.num_computed_tokens, scheduled.seq_len)
    return torch.tensor(token_ids)


def _sample_row(scheduled: ScheduledSequence) -> SampleRow:
    sequence = scheduled.sequence
    return SampleRow(sampling_params=sequence.sampling_params, output_position=sequence.num_output_tokens)
