"""One safetensors file: its header checked before anything is believed, its tensors read one at a time.

Reads into memory instead of mapping the file: a mapped page stays in the resident set as long as the mapping lives, and
loading would then need the file's size on top of what is kept. Format: github.com/huggingface/safetensors.
"""

import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_DIMENSIONS = 8
MAPPED_BYTES = 1 << 20  # tensors from this size on get pages of their own
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class InvalidCheckpoint(ValueError):
    """A checkpoint lacks something or a file of it is broken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """Where a tensor lies."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # byte in the file
    num_bytes: int


class SafetensorsFile:
    """The header is read and checked once; each read opens the file anew and closes it."""

    def __init__(self, path: Path) -> None:
        """Raises InvalidCheckpoint if the file is missing, truncated or its header is not valid."""
        self.path = path
        try:
            self.entries = _read_header(path)
        except OSError as error:
            raise InvalidCheckpoint(f"{path}: cannot be read: {error.strerror}") from error

    def read(self, name: str) -> Tensor:
        """The tensor in the file's dtype, in memory of its own. Raises InvalidCheckpoint."""
        entry = self.entries[name]
        buffer = _buffer(entry.num_bytes)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(entry.start)
                view, num_read = memoryview(buffer.numpy().data), 0
                while num_read < entry.num_bytes and (count := file.readinto(view[num_read:])):
                    num_read += count
        except OSError as error:
            raise InvalidCheckpoint(f"{self.path}: tensor {name} cannot be read: {error.strerror}") from error
        if num_read != entry.num_bytes:
            raise InvalidCheckpoint(
                f"{self.path}: tensor {name} ends after {num_read} of {entry.num_bytes} bytes; fetch the file again"
            )
        return buffer.view(entry.dtype).reshape(entry.shape)


def _buffer(num_bytes: int) -> Tensor:
    """Memory for a tensor, as bytes.

    Large ones do not come from malloc: glibc answers the first large free by keeping later ones in its heap, and what
    is read, converted and dropped while loading then leaves holes, up to a third of what is kept.
    """
    if num_bytes < MAPPED_BYTES:
        return torch.empty(num_bytes, dtype=torch.uint8)
    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8)


def _read_header(path: Path) -> dict[str, TensorEntry]:
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if file_bytes < 8 or header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
            raise InvalidCheckpoint(
                f"{path}: header of {header_bytes} bytes in a file of {file_bytes}; not safetensors, or truncated"
            )
        try:
            header = json.loads(file.read(header_bytes), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise InvalidCheckpoint(f"{path}: header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise InvalidCheckpoint(f"{path}: header holds a {type(header).__name__}, expected a JSON object")
    header.pop("__metadata__", None)
    data_start = 8 + header_bytes
    entries = {name: _entry(path, name, fields, data_start) for name, fields in header.items()}
    _refuse_overlaps(path, entries)
    needed = max((entry.start + entry.num_bytes for entry in entries.values()), default=data_start)
    if file_bytes < needed:
        last = max(entries, key=lambda name: entries[name].start + entries[name].num_bytes)
        raise InvalidCheckpoint(
            f"{path}: truncated, {file_bytes} bytes where tensor {last} needs {needed}; fetch the file again"
        )
    return entries


def _entry(path: Path, name: str, fields: Any, data_start: int) -> TensorEntry:
    fields = fields if isinstance(fields, dict) else {}
    dtype_name, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
        raise InvalidCheckpoint(
            f"{path}: tensor {name} has shape {str(shape)[:80]} and data_offsets {str(offsets)[:80]}; header broken"
        )
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise InvalidCheckpoint(f"{path}: tensor {name} has dtype {dtype_name!r}, known are {sorted(DTYPES)}")
    dtype, num_bytes = DTYPES[dtype_name], offsets[1] - offsets[0]
    if math.prod(shape) * dtype.itemsize != num_bytes:
        raise InvalidCheckpoint(
            f"{path}: tensor {name} of shape {shape} in {dtype_name} needs {math.prod(shape) * dtype.itemsize} bytes, "
            f"its data_offsets hold {num_bytes}"
        )
    return TensorEntry(dtype=dtype, shape=tuple(shape), start=data_start + offsets[0], num_bytes=num_bytes)


def _refuse_overlaps(path: Path, entries: dict[str, TensorEntry]) -> None:
    end, before = 0, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        if entry.start < end:
            raise InvalidCheckpoint(f"{path}: tensor {name} begins within {before}; header broken")
        end, before = entry.start + entry.num_bytes, name


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of the header. A name that stands twice would leave one of two tensors unseen."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice")
    return found


def _are_sizes(values: Any) -> bool:
    if not isinstance(values, list) or len(values) > MAX_DIMENSIONS:  # a product of a million sizes never ends
        return False
    return all(type(value) is int and 0 <= value < 2**63 for value in values)
