"""One step's rows as attention needs to see them. Built by the model runner from what the scheduler chose."""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMetadata:
    """Decode rows and prefill chunks alike: a sequence brings one or more rows, and there are no phases."""

    positions: Tensor  # [num_tokens] int64, place of each row in its sequence
    slot_mapping: Tensor  # [num_tokens] int64, block_id * block_size + offset, where each row's latent is written
    query_start_loc: tuple[int, ...]  # num_seqs + 1; sequence i has rows query_start_loc[i] to query_start_loc[i + 1]
    seq_lens: tuple[int, ...]  # num_seqs; tokens of context, this step's rows included
    num_prompt_tokens: tuple[int, ...]  # num_seqs; tokens of the whole prompt, what follows was generated
    block_tables: Tensor  # [num_seqs, max_num_blocks] int32, padded with 0

    def __post_init__(self) -> None:
        assert len(self.query_start_loc) == len(self.seq_lens) + 1 == self.block_tables.shape[0] + 1
        assert len(self.num_prompt_tokens) == len(self.seq_lens)
        assert self.query_start_loc[0] == 0
        assert self.query_start_loc[-1] == self.positions.shape[0] == self.slot_mapping.shape[0]
        assert all(0 < self.query_len(i) <= seq_len for i, seq_len in enumerate(self.seq_lens))

    @property
    def num_tokens(self) -> int:
        return self.query_start_loc[-1]

    @property
    def num_seqs(self) -> int:
        return len(self.seq_lens)

    def query_len(self, seq_index: int) -> int:
        """Rows that sequence brings in this step."""
        return self.query_start_loc[seq_index + 1] - self.query_start_loc[seq_index]

    def split(self, count: int) -> list[tuple[slice, "AttentionMetadata"]]:
        """The rows in `count` nearly equal parts, in order: where each lies and how attention sees it.

        A sequence may be cut: its later rows' part must then write and attend after the earlier rows' one.
        """
        if count == 1:
            return [(slice(0, self.num_tokens), self)]
        bounds = [self.num_tokens * i // count for i in range(count + 1)]
        return [(slice(start, end), self._rows(start, end)) for start, end in pairwise(bounds)]

    def _rows(self, start: int, end: int) -> "AttentionMetadata":
        """Of the rows from `start` to `end`, at least one."""
        loc = self.query_start_loc
        first = bisect_right(loc, start) - 1
        last = bisect_left(loc, end)  # sequences first to last - 1 have rows here
        starts = [max(loc[i], start) - start for i in range(first, last)]
        return AttentionMetadata(
            positions=self.positions[start:end],
            slot_mapping=self.slot_mapping[start:end],
            query_start_loc=(*starts, end - start),
            seq_lens=tuple(self.seq_lens[i] - max(0, loc[i + 1] - end) for i in range(first, last)),
            num_prompt_tokens=self.num_prompt_tokens[first:last],
            block_tables=self.block_tables[first:last],
        )
