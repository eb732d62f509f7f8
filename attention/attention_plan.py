"""Which form of MLA each row of a step takes, decided once a step for all layers. Computes nothing but indices."""

import ctypes
import struct
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attention.attention_metadata import AttentionMetadata
from attention.mla_form import MlaForm

_STEP = struct.Struct("6P4i")  # struct MlaStep in experts/kernels/native/kernels.h
QUERIES_PER_PIECE = 64  # rows of one sequence in one absorbed call of torch; bounds the scores in memory


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSpan:
    """Neighbouring rows of one sequence that take the same form."""

    seq_index: int
    start_row: int
    end_row: int
    seq_len: int  # context up to and including the last of these rows

    @property
    def num_rows(self) -> int:
        return self.end_row - self.start_row

    @property
    def num_context_tokens(self) -> int:
        """Tokens before the first of these rows."""
        return self.seq_len - self.num_rows

    def rows_among(self, wanted: Sequence[int]) -> "list[RowSpan]":
        """Those of its rows that are wanted, each alone. wanted: rows of the step, ascending."""
        mine = wanted[bisect_left(wanted, self.start_row) : bisect_left(wanted, self.end_row)]
        return [
            RowSpan(
                seq_index=self.seq_index,
                start_row=row,
                end_row=row + 1,
                seq_len=self.seq_len - (self.end_row - row - 1),
            )
            for row in mine
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class AbsorbedBatch:
    """Pieces of sequences with equally many rows, attended to in one call."""

    rows: Tensor  # [num_pieces * query_len] int64, into the step's rows
    query_len: int  # rows a piece
    block_tables: Tensor  # [num_pieces, max_num_blocks] int32
    seq_lens: tuple[int, ...]  # context of each piece, up to its last row


class KernelSpan(ctypes.Structure):
    """struct MlaSpan: neighbouring rows in the same form; sequence and num_context_tokens are those of naive ones."""

    _fields_ = tuple(
        (name, ctypes.c_int32) for name in ("start_row", "num_rows", "is_absorbed", "sequence", "num_context_tokens")
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRows:
    """The same for kernels, which take absorbed rows one by one, of whatever sequence.

    sequences, context_lens: [num_tokens] int32, of absorbed rows: their sequence, and the tokens that each sees.
    step: struct MlaStep, which names this memory and the plan's.
    """

    spans: ctypes.Array[KernelSpan]
    sequences: Tensor
    context_lens: Tensor
    step: bytes


@dataclass(frozen=True)
class AttentionPlan:
    """Every row of the step whose attention is wanted is in exactly one span.

    output_rows: [n] int64, ascending, those that are wanted; None for all. The others leave their latents.
    """

    metadata: AttentionMetadata
    naive: tuple[RowSpan, ...]
    absorbed: tuple[RowSpan, ...]
    output_rows: Tensor | None = None

    @classmethod
    def build(cls, metadata: AttentionMetadata, form: MlaForm) -> "AttentionPlan":
        naive, absorbed = [], []
        for seq_index, seq_len in enumerate(metadata.seq_lens):
            start_row, end_row = metadata.query_start_loc[seq_index : seq_index + 2]
            match form:
                case MlaForm.BY_POSITION:
                    num_generated = max(0, seq_len - metadata.num_prompt_tokens[seq_index])
                    num_absorbed = min(num_generated, end_row - start_row)
                case MlaForm.ABSORBED:
                    num_absorbed = end_row - start_row
                case MlaForm.NAIVE:
                    num_absorbed = 0
            middle = end_row - num_absorbed
            if start_row < middle:
                naive.append(
                    RowSpan(seq_index=seq_index, start_row=start_row, end_row=middle, seq_len=seq_len - num_absorbed)
                )
            if middle < end_row:
                absorbed.append(RowSpan(seq_index=seq_index, start_row=middle, end_row=end_row, seq_len=seq_len))
        return cls(metadata, tuple(naive), tuple(absorbed))

    def narrowed(self, output_rows: Sequence[int]) -> "AttentionPlan":
        """The same for these rows only, ascending."""
        return AttentionPlan(
            self.metadata,
            tuple(row for span in self.naive for row in span.rows_among(output_rows)),
            tuple(row for span in self.absorbed for row in span.rows_among(output_rows)),
            torch.tensor(output_rows, dtype=torch.int64, device=self.metadata.positions.device),
        )

    @cached_property
    def kernel_rows(self) -> KernelRows:
        """For kernels: absorbed spans that are neighbours become one."""
        sequences, context_lens = [0] * self.metadata.num_tokens, [0] * self.metadata.num_tokens
        runs: list[tuple[int, int]] = []  # first and last row + 1
        for span in self.absorbed:
            start, end = span.start_row, span.end_row
            sequences[start:end] = [span.seq_index] * (end - start)
            context_lens[start:end] = range(span.num_context_tokens + 1, span.seq_len + 1)
            if runs and runs[-1][1] == start:
                start = runs.pop()[0]
            runs.append((start, end))
        spans = [KernelSpan(start, end - start, 1, 0, 0) for start, end in runs]
        spans += [
            KernelSpan(span.start_row, span.num_rows, 0, span.seq_index, span.num_context_tokens) for span in self.naive
        ]
        rows = torch.tensor([sequences, context_lens], dtype=torch.int32)
        spans_array = (KernelSpan * len(spans))(*spans)
        return KernelRows(
            spans=spans_array, sequences=rows[0], context_lens=rows[1], step=self._kernel_step(spans_array, rows)
        )

    def _kernel_step(self, spans: ctypes.Array[KernelSpan], rows: Tensor) -> bytes:
        metadata, output_rows = self.metadata, self.output_rows
        assert metadata.block_tables.dtype is torch.int32
        assert metadata.block_tables.stride(1) == metadata.slot_mapping.stride(0) == 1
        return _STEP.pack(
            metadata.slot_mapping.data_ptr(),
            metadata.block_tables.data_ptr(),
            rows.data_ptr(),
            rows.data_ptr() + 4 * metadata.num_tokens,
            ctypes.addressof(spans),
            0 if output_rows is None else output_rows.data_ptr(),
            metadata.num_tokens,
            metadata.num_tokens if output_rows is None else len(output_rows),
            len(spans),
            metadata.block_tables.stride(0),
        )

    @cached_property
    def absorbed_batches(self) -> tuple[AbsorbedBatch, ...]:
        """For torch: pieces of equal length together."""
        pieces: dict[int, list[RowSpan]] = {}  # by number of rows
        for span in self.absorbed:
            for start in range(span.start_row, span.end_row, QUERIES_PER_PIECE):
                end = min(start + QUERIES_PER_PIECE, span.end_row)
                piece = RowSpan(
                    seq_index=span.seq_index, start_row=start, end_row=end, seq_len=span.seq_len - (span.end_row - end)
                )
                pieces.setdefault(piece.num_rows, []).append(piece)
        return tuple(self._batch(pieces[query_len], query_len) for query_len in sorted(pieces))

    def _batch(self, pieces: list[RowSpan], query_len: int) -> AbsorbedBatch:
        block_tables = self.metadata.block_tables
        start_rows = torch.tensor([piece.start_row for piece in pieces], device=block_tables.device)
        rows = (start_rows.unsqueeze(-1) + torch.arange(query_len, device=block_tables.device)).flatten()
        seq_indices = torch.tensor([piece.seq_index for piece in pieces], device=block_tables.device)
        return AbsorbedBatch(
            rows=rows,
            query_len=query_len,
            block_tables=block_tables[seq_indices],
            seq_lens=tuple(piece.seq_len for piece in pieces),
        )
