"""Bytes at a known address, and matrices in them: what compiled code asks of a tensor, without making one.

Between two computations, which push all else out of the caches, making a tensor of memory takes 0.1 ms, and this a
tenth of that. Knows nothing of what the numbers mean.
"""

import warnings
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Memory of received bytes is read-only; torch has no such tensors and warns of it.
warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)


class Memory(NamedTuple):
    """Contiguous bytes from `offset` on in a buffer that this keeps alive. Read-only where the buffer is."""

    buffer: memoryview  # of single bytes
    buffer_address: int
    offset: int
    num_bytes: int

    @classmethod
    def of(cls, buffer: memoryview | bytes) -> "Memory":
        """All of a buffer."""
        view = memoryview(buffer)
        address = np.frombuffer(view, dtype=np.uint8).ctypes.data if view.nbytes else 0
        return cls(view, address, 0, view.nbytes)

    @property
    def address(self) -> int:
        """Of the first byte."""
        return self.buffer_address + self.offset

    @property
    def view(self) -> memoryview:
        """The bytes in place."""
        return self.buffer[self.offset : self.offset + self.num_bytes]

    def part(self, offset: int, num_bytes: int) -> "Memory":
        """Some of it, which must lie within."""
        assert 0 <= offset <= offset + num_bytes <= self.num_bytes
        return Memory(self.buffer, self.buffer_address, self.offset + offset, num_bytes)


class RawMatrix:
    """Numbers in memory, contiguous."""

    __slots__ = ("dtype", "memory", "shape")  # no named tuple, whose length would be taken for the number of rows

    def __init__(self, memory: Memory, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.memory = memory
        self.shape = shape
        self.dtype = dtype

    def data_ptr(self) -> int:
        """The address of the first number."""
        return self.memory.address

    def is_contiguous(self) -> bool:
        """As of a tensor."""
        return True

    def tensor(self) -> Tensor:
        """The same in place. To be read only where the memory is."""
        if not self.memory.num_bytes:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(self.memory.view, dtype=self.dtype).view(self.shape)


Matrix = Tensor | RawMatrix


def as_tensor(matrix: Matrix) -> Tensor:
    """The matrix as a tensor, in place."""
    return matrix.tensor() if isinstance(matrix, RawMatrix) else matrix
