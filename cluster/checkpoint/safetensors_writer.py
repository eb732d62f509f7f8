"""Writes safetensors files tensor by tensor: the header first, from shapes alone, then each tensor where it belongs.

Memory holds one tensor at a time, and the order in which they come does not matter. Knows nothing of models.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from cluster.checkpoint.safetensors_file import DTYPES

ALIGNMENT = 8  # bytes; the data begins at a multiple
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorHeader:
    """A tensor that will be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def split_into_files(groups: Mapping[str, Mapping[str, TensorHeader]], max_bytes: int) -> list[dict[str, TensorHeader]]:
    """The tensors of each file, in order. A group stays together, so a file may exceed max_bytes by the last one's."""
    files: list[dict[str, TensorHeader]] = [{}]
    num_bytes = 0
    for tensors in groups.values():
        if num_bytes >= max_bytes:
            files.append({})
            num_bytes = 0
        files[-1] |= tensors
        num_bytes += sum(header.num_bytes for header in tensors.values())
    return files


class SafetensorsWriter:
    """One file. Leaving the block closes it; it is complete once every tensor was written."""

    def __init__(self, path: Path, tensors: Mapping[str, TensorHeader]) -> None:
        """Creates the file with its header."""
        # Wide elements first, as the format's own library does: every tensor then begins at a multiple of its element.
        order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
        self._tensors = tensors
        self._starts: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in order:
            start, end = end, end + tensors[name].num_bytes
            self._starts[name] = start
            header[name] = {
                "dtype": NAMES[tensors[name].dtype],
                "shape": list(tensors[name].shape),
                "data_offsets": [start, end],
            }
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % ALIGNMENT)
        self._data_start = 8 + len(encoded)
        self._file = path.open("xb", buffering=0)
        self._write(0, memoryview(len(encoded).to_bytes(8, "little") + encoded))
        self._file.truncate(self._data_start + end)

    def write(self, name: str, tensor: Tensor) -> None:
        """Raises OSError, for instance when the disk is full."""
        header = self._tensors[name]
        assert (tensor.dtype, tuple(tensor.shape)) == (header.dtype, header.shape), "the header has been written"
        if header.num_bytes:
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
            self._write(self._data_start + self._starts[name], memoryview(data))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _write(self, position: int, data: memoryview) -> None:
        self._file.seek(position)
        while data:
            data = data[self._file.write(data) :]
