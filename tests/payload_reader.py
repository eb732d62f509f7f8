"""Reads a payload of several tensors, as a peer with another implementation would."""

import torch
from torch import Tensor

from protos.errors import InvalidRequest


class PayloadReader:
    """Takes tensors off the front of a payload, as views. The bytes are read-only: do not write to the tensors."""

    def __init__(self, payload: memoryview) -> None:
        self._payload = payload
        self._offset = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The next tensor. Raises InvalidRequest when the payload is too short for it."""
        count = 1
        for size in shape:
            count *= size
        num_bytes = count * dtype.itemsize
        left = len(self._payload) - self._offset
        if num_bytes > left:
            raise InvalidRequest(f"payload has {left} bytes left, {list(shape)} of {dtype} needs {num_bytes}")
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        flat = torch.frombuffer(self._payload, dtype=dtype, count=count, offset=self._offset)
        self._offset += num_bytes
        return flat.view(shape)

    def finish(self) -> None:
        """Raises InvalidRequest when bytes are left."""
        if self._offset != len(self._payload):
            raise InvalidRequest(f"payload has {len(self._payload) - self._offset} bytes too many")
