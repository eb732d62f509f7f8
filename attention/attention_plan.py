"""Which form of MLA each sequence of a step takes, decided once a step for all layers. No tensor is computed here
but indices."""

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from attention.attention_metadata import AttentionMetadata
from attention.mla_config import MlaConfig

QUERIES_PER_PIECE = 64  # rows of one sequence in one absorbed call; bounds the scores in memory


class MlaForm(Enum):
    """How attention over latents is computed; the results agree but for rounding."""

    CHEAPER = "cheaper"  # per sequence, by MlaConfig.is_absorption_cheaper
    ABSORBED = "absorbed"  # always: then how a prompt is cut into chunks does not change a bit of the result
    NAIVE = "naive"  # always


@dataclass(frozen=True, slots=True, kw_only=True)
class AbsorbedBatch:
    """Pieces of sequences with equally many rows, attended to in one call."""

    rows: Tensor  # [num_pieces * query_len] int64, into the step's rows
    query_len: int  # rows a piece
    block_tables: Tensor  # [num_pieces, max_num_blocks] int32
    seq_lens: tuple[int, ...]  # context of each piece, up to its last row


@dataclass(frozen=True, slots=True, kw_only=True)
class NaiveSequence:
    """One sequence's rows."""

    start_row: int
    end_row: int
    block_table: Tensor  # [max_num_blocks] int32
    seq_len: int

    @property
    def num_context_tokens(self) -> int:
        """Tokens before this step's."""
        return self.seq_len - (self.end_row - self.start_row)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """Every row of the step is in exactly one of the two."""

    absorbed: tuple[AbsorbedBatch, ...]
    naive: tuple[NaiveSequence, ...]

    @classmethod
    def build(cls, metadata: AttentionMetadata, config: MlaConfig, form: MlaForm) -> "AttentionPlan":
        pieces: dict[int, list[_Piece]] = {}  # by number of rows
        naive = []
        for seq_index, seq_len in enumerate(metadata.seq_lens):
            start_row, end_row = metadata.query_start_loc[seq_index : seq_index + 2]
            is_absorbed = form is MlaForm.ABSORBED or (
                form is MlaForm.CHEAPER and config.is_absorption_cheaper(end_row - start_row, seq_len)
            )
            if not is_absorbed:
                block_table = metadata.block_tables[seq_index]
                naive.append(
                    NaiveSequence(start_row=start_row, end_row=end_row, block_table=block_table, seq_len=seq_len)
                )
                continue
            for start in range(start_row, end_row, QUERIES_PER_PIECE):
                end = min(start + QUERIES_PER_PIECE, end_row)
                piece = _Piece(seq_index=seq_index, start_row=start, seq_len=seq_len - (end_row - end))
                pieces.setdefault(end - start, []).append(piece)
        absorbed = tuple(_batch(pieces[query_len], query_len, metadata) for query_len in sorted(pieces))
        return cls(absorbed=absorbed, naive=tuple(naive))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    seq_index: int
    start_row: int
    seq_len: int


def _batch(pieces: list[_Piece], query_len: int, metadata: AttentionMetadata) -> AbsorbedBatch:
    device = metadata.block_tables.device
    start_rows = torch.tensor([piece.start_row for piece in pieces], device=device)
    rows = (start_rows.unsqueeze(-1) + torch.arange(query_len, device=device)).flatten()
    seq_indices = torch.tensor([piece.seq_index for piece in pieces], device=device)
    return AbsorbedBatch(
        rows=rows,
        query_len=query_len,
        block_tables=metadata.block_tables[seq_indices],
        seq_lens=tuple(piece.seq_len for piece in pieces),
    )
