"""Which blocks of the latent cache belong to which sequence. Knows nothing of tensors, requests or scheduling.

Ask, then do: `can_allocate` tells whether `allocate` will succeed. Not thread-safe; the engine thread owns it.
"""

from collections import deque

from attention.sequence import Sequence


class BlockIntegrityError(RuntimeError):
    """The block accounting contradicts itself: a fault of ours, never of a request."""


class BlockManager:
    """Blocks of `block_size` tokens, handed out in the order in which they were freed."""

    def __init__(self, *, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks is {num_blocks} and block_size is {block_size}, both must be 1 or more")
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._free_block_ids: deque[int] = deque(range(num_blocks))
        self._block_tables: dict[Sequence, list[int]] = {}

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def block_size(self) -> int:
        return self._block_size

    @property
    def num_free(self) -> int:
        return len(self._free_block_ids)

    @property
    def num_used(self) -> int:
        return self._num_blocks - len(self._free_block_ids)

    @property
    def max_num_tokens(self) -> int:
        """Tokens of the longest sequence that the cache can hold alone."""
        return self._num_blocks * self._block_size

    def can_allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether the sequence can have room for its first `num_tokens` tokens."""
        return self._num_missing(sequence, num_tokens) <= self.num_free

    def allocate(self, sequence: Sequence, num_tokens: int) -> None:
        """Extends the sequence's block table to hold its first `num_tokens` tokens; `can_allocate` must be true."""
        num_missing = self._num_missing(sequence, num_tokens)
        assert num_missing <= self.num_free, f"{num_missing} blocks asked, {self.num_free} are free"
        block_table = self._block_tables.setdefault(sequence, [])
        block_table.extend(self._free_block_ids.popleft() for _ in range(num_missing))

    def free(self, sequence: Sequence) -> None:
        """Takes all blocks of the sequence back, if it has any."""
        self._free_block_ids.extend(self._block_tables.pop(sequence, ()))

    def block_table(self, sequence: Sequence) -> tuple[int, ...]:
        """Ids of the sequence's blocks, in the order of its tokens."""
        return tuple(self._block_tables.get(sequence, ()))

    def check_integrity(self) -> None:
        """Raises BlockIntegrityError unless every block is free or owned by one sequence, once."""
        owned = [block_id for block_table in self._block_tables.values() for block_id in block_table]
        everything = sorted([*owned, *self._free_block_ids])
        if everything != list(range(self._num_blocks)):
            raise BlockIntegrityError(
                f"{len(owned)} owned and {self.num_free} free blocks are not the {self._num_blocks} blocks once each"
            )

    def _num_missing(self, sequence: Sequence, num_tokens: int) -> int:
        num_needed = -(-num_tokens // self._block_size)
        return max(0, num_needed - len(self._block_tables.get(sequence, ())))
