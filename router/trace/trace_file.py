"""A trace as a file: an .npz that needs no pickle, written and read one window at a time.

The file is a zip archive, deflated, with these members in this order:

    trace.json          format "mobula-trace", version 1, source, seed, started_at, the model's shape and its gate
    window_000000.npy   topk_ids [num_moe_layers, num_tokens, top_k], uint8 up to 256 experts, else uint16; logical
    window_000001.npy   experts, ascending in a row
    ...
    windows.json        {"windows": [{"num_tokens", "start_s", "seconds", "label"}, ...]}, one for each window

`numpy.load(path)["window_000000"]` reads a window; so does any zip and npy reader. A DeepSeek-V2 token takes 354 bytes
before deflating. An unfinished file has the suffix .unfinished, is never read as a trace and goes when writing fails.

Reading trusts nothing: sizes are checked before memory is taken, ids and checksums when a window is read. An npy header
is compared with the one it must be and never evaluated, as numpy would.
"""

import json
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from router.trace.header_json import header_from_json, header_to_json, parse_object
from router.trace.model_shape import ModelShape
from router.trace.trace import MAX_WINDOW_BYTES, TraceError, TraceHeader, TraceWindow, check_window, id_dtype

HEADER_NAME, INDEX_NAME = "trace.json", "windows.json"
MAX_JSON_BYTES = 2**26
MAX_WINDOWS = 1_000_000

# What zipfile and numpy raise for archives that were cut, changed or made to do harm.
_BROKEN = (
    *(zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError),
    *(ValueError, TypeError, IndexError, KeyError, OverflowError, MemoryError),
)


class TraceWriter:
    """Use as a context manager: the file appears when the block ends well, and only then. Holds one window."""

    def __init__(self, path: Path, header: TraceHeader) -> None:
        """Raises TraceError when the file cannot be made."""
        self.path = path
        self.num_tokens = 0
        self._header = header
        self._index: list[dict[str, Any]] = []
        self._unfinished = path.with_name(path.name + ".unfinished")
        try:
            self._archive = zipfile.ZipFile(self._unfinished, "w", zipfile.ZIP_DEFLATED)
        except OSError as error:
            raise TraceError(f"cannot write {path}: {error.strerror}") from error
        self._write(HEADER_NAME, header_to_json(header))

    def add(self, window: TraceWindow) -> None:
        """Appends a window; one without tokens leaves nothing. Raises TraceError."""
        check_window(window, self._header.model)
        if not window.num_tokens:
            return
        if len(self._index) == MAX_WINDOWS:
            raise TraceError(f"the trace has {MAX_WINDOWS} windows, which is the limit: use larger ones, or a new file")
        with self._archive.open(_member(_window_name(len(self._index))), "w") as file:
            np.lib.format.write_array(file, np.ascontiguousarray(window.topk_ids), (1, 0), allow_pickle=False)
        self._index.append(
            {
                "num_tokens": window.num_tokens,
                "start_s": round(window.start_s, 6),
                "seconds": round(window.seconds, 6),
                "label": window.label,
            }
        )
        self.num_tokens += window.num_tokens

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._write(INDEX_NAME, json.dumps({"windows": self._index}).encode())
            self._archive.close()
            if kind is None:
                self._unfinished.replace(self.path)
        finally:
            self._unfinished.unlink(missing_ok=True)

    def _write(self, name: str, content: bytes) -> None:
        self._archive.writestr(_member(name), content)


class TraceFile:
    """A trace on disk. Opening reads header and index, `windows` one window after the other."""

    def __init__(self, path: Path) -> None:
        """Raises TraceError, also when the file is missing."""
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                self.header = header_from_json(_read_json(archive, HEADER_NAME))
                self._windows = _index(_read_json(archive, INDEX_NAME), self.header.model)
        except _BROKEN as error:
            raise self._broken(error) from error

    @property
    def num_tokens(self) -> int:
        return sum(window.num_tokens for window in self._windows)

    @property
    def num_windows(self) -> int:
        return len(self._windows)

    def windows(self) -> Iterator[TraceWindow]:
        """In order. Raises TraceError at the first one that is broken."""
        model = self.header.model
        try:
            with zipfile.ZipFile(self.path) as archive:
                for number, entry in enumerate(self._windows):
                    with archive.open(_window_name(number)) as file:
                        ids = _read_ids(file, entry, model)
                    window = TraceWindow(topk_ids=ids, start_s=entry.start_s, seconds=entry.seconds, label=entry.label)
                    check_window(window, model)
                    yield window
        except _BROKEN as error:
            raise self._broken(error) from error

    def _broken(self, error: BaseException) -> TraceError:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if isinstance(error, zipfile.BadZipFile | zlib.error | EOFError):
            reason += "; truncated or no trace: record it again"
        return TraceError(f"{self.path}: {reason.strip(chr(34))}")


class _Entry:
    """A window as the index has it."""

    __slots__ = ("label", "num_tokens", "seconds", "start_s")

    def __init__(self, fields: object, number: int) -> None:
        values = fields if isinstance(fields, dict) else {}
        num_tokens, label = values.get("num_tokens"), values.get("label")
        times = values.get("start_s"), values.get("seconds")
        if type(num_tokens) is not int or num_tokens < 1 or not isinstance(label, str):
            raise TraceError(f"window {number} has num_tokens {num_tokens!r} and label {label!r}; the index is broken")
        if not all(type(value) in (int, float) for value in times):
            raise TraceError(f"window {number} has start_s {times[0]!r} and seconds {times[1]!r}; the index is broken")
        self.num_tokens, self.label = num_tokens, label
        self.start_s, self.seconds = (float(str(value)) for value in times)


def _index(content: bytes, model: ModelShape) -> list[_Entry]:
    windows = parse_object(content, INDEX_NAME).get("windows")
    if not isinstance(windows, list) or len(windows) > MAX_WINDOWS:
        raise TraceError(f"{INDEX_NAME} has no list of up to {MAX_WINDOWS} windows")
    entries = [_Entry(fields, number) for number, fields in enumerate(windows)]
    token_bytes = model.num_moe_layers * model.top_k * id_dtype(model.gate.n_routed_experts).itemsize
    for number, entry in enumerate(entries):
        if entry.num_tokens * token_bytes > MAX_WINDOW_BYTES:
            raise TraceError(
                f"window {number} says it has {entry.num_tokens} tokens, {entry.num_tokens * token_bytes} bytes; "
                f"limit is {MAX_WINDOW_BYTES}"
            )
    return entries


def _read_json(archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        member = archive.getinfo(name)
    except KeyError as error:
        raise TraceError(f"the archive has no {name}: not a trace") from error
    if member.file_size > MAX_JSON_BYTES:
        raise TraceError(f"{name} has {member.file_size} bytes, limit is {MAX_JSON_BYTES}")
    return archive.read(member)  # zipfile gives no more than file_size


def _read_ids(file: IO[bytes], entry: _Entry, model: ModelShape) -> Any:
    """[num_moe_layers, num_tokens, top_k]; nothing is allocated before the array's header is what it must be."""
    dtype = id_dtype(model.gate.n_routed_experts)
    wanted = (model.num_moe_layers, entry.num_tokens, model.top_k)
    magic = file.read(10)
    if len(magic) < 10 or magic[:8] != b"\x93NUMPY\x01\x00":
        raise TraceError("a window is not an npy array of version 1.0")
    header = file.read(int.from_bytes(magic[8:], "little"))
    expected = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': {wanted}, }}"
    if header.rstrip(b" \n").decode("latin-1") != expected:
        raise TraceError(f"a window's header is {header[:100]!r}, the index says {expected}")
    num_bytes = int(np.prod(wanted, dtype=np.int64)) * dtype.itemsize
    content = file.read(num_bytes)
    if len(content) != num_bytes or file.read(1):  # the read past the end also checks the checksum
        raise TraceError(f"a window has {len(content)} bytes or more of expert ids, needs {num_bytes}")
    return np.frombuffer(content, dtype=dtype).reshape(wanted)


def _window_name(number: int) -> str:
    return f"window_{number:06d}.npy"


def _member(name: str) -> zipfile.ZipInfo:
    """With a fixed date, so that the same trace is the same bytes."""
    member = zipfile.ZipInfo(name)
    member.compress_type = zipfile.ZIP_DEFLATED
    return member
