"""Which form of MLA each row of a step takes, decided once a step for all layers. Computes nothing but indices."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attention.attention_metadata import AttentionMetadata
from attention.mla_form import MlaForm

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


@dataclass(frozen=True, slots=True, kw_only=True)
class AbsorbedBatch:
    """Pieces of sequences with equally many rows, attended to in one call."""

    rows: Tensor  # [num_pieces * query_len] int64, into the step's rows
    query_len: int  # rows a piece
    block_tables: Tensor  # [num_pieces, max_num_blocks] int32
    seq_lens: tuple[int, ...]  # context of each piece, up to its last row


@dataclass(frozen=True, slots=True, kw_only=True)
class AbsorbedRows:
    """All absorbed rows, each on its own."""

    rows: Tensor | slice  # [num_rows] int64, into the step's rows; a slice where they are neighbours
    seq_indices: Tensor  # [num_rows] int32
    context_lens: Tensor  # [num_rows] int32, tokens that each row sees


@dataclass(frozen=True)
class AttentionPlan:
    """Every row of the step is in exactly one span."""

    metadata: AttentionMetadata
    naive: tuple[RowSpan, ...]
    absorbed: tuple[RowSpan, ...]

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

    @cached_property
    def absorbed_rows(self) -> AbsorbedRows | None:
        """For kernels that take rows one by one; None where there are none."""
        spans = self.absorbed
        if not spans:
            return None
        rows = [row for span in spans for row in range(span.start_row, span.end_row)]
        seq_indices = [span.seq_index for span in spans for _ in range(span.num_rows)]
        context_lens = [n for span in spans for n in range(span.num_context_tokens + 1, span.seq_len + 1)]
        are_neighbours = rows[-1] - rows[0] == len(rows) - 1
        return AbsorbedRows(
            rows=slice(rows[0], rows[-1] + 1) if are_neighbours else torch.tensor(rows),
            seq_indices=torch.tensor(seq_indices, dtype=torch.int32),
            context_lens=torch.tensor(context_lens, dtype=torch.int32),
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
