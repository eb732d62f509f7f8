"""Which bytes of a ring's memory are in use: first fit over a list of free blocks. Knows nothing of memory itself.

Low offsets are taken first, so that the pages in use stay few and warm; a worker has a handful of regions at a time.
"""

from bisect import bisect_left

from protos.ring import ALIGNMENT


class Arena:
    """Offsets into `num_bytes` bytes. Belongs to one thread."""

    def __init__(self, num_bytes: int) -> None:
        self._free_offsets = [0] if num_bytes else []  # ascending; no two blocks touch
        self._free_sizes = [num_bytes] if num_bytes else []
        self._sizes: dict[int, int] = {}  # of live regions, by offset

    @property
    def used_bytes(self) -> int:
        """In live regions, with their padding."""
        return sum(self._sizes.values())

    @property
    def free_blocks(self) -> list[tuple[int, int]]:
        """(offset, bytes) of each, ascending."""
        return list(zip(self._free_offsets, self._free_sizes, strict=True))

    def allocate(self, num_bytes: int) -> int | None:
        """The offset of a region that overlaps no live one, a multiple of ALIGNMENT; None when there is no room."""
        size = max(ALIGNMENT, -(-num_bytes // ALIGNMENT) * ALIGNMENT)
        index = next((index for index, free in enumerate(self._free_sizes) if free >= size), None)
        if index is None:
            return None
        offset = self._free_offsets[index]
        if self._free_sizes[index] == size:
            del self._free_offsets[index], self._free_sizes[index]
        else:
            self._free_offsets[index] += size
            self._free_sizes[index] -= size
        self._sizes[offset] = size
        return offset

    def free(self, offset: int) -> None:
        """Gives a region back."""
        size = self._sizes.pop(offset)
        index = bisect_left(self._free_offsets, offset)
        if index < len(self._free_offsets) and offset + size == self._free_offsets[index]:
            size += self._free_sizes[index]
            del self._free_offsets[index], self._free_sizes[index]
        if index > 0 and self._free_offsets[index - 1] + self._free_sizes[index - 1] == offset:
            self._free_sizes[index - 1] += size
        else:
            self._free_offsets.insert(index, offset)
            self._free_sizes.insert(index, size)
