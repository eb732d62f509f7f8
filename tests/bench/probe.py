"""What the machine gives right now: bytes read a second and operations a second, both over all given threads.

The project's native library measures them where it is built; torch does where it is not. Other work on the machine
moves these figures by half from one minute to the next, so a probe stands between any two repeats.
"""

import importlib
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tests.bench.row import PEAK_PROBE, READ_PROBE, Param

LIBRARY = "experts.kernels.library"
BUFFER_BYTES = 384 * 2**20  # beyond any cache
MATRIX_SIZE = 1024
NUM_REPEATS = 3  # of a look; the best counts
KINDS = {"bf16": "BFLOAT16", "float32": "FLOAT32", "int8": "INT8", "int4": "INT4"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One look at the machine."""

    bytes_per_s: float
    operations_per_s: float


class Probe:
    """Looks when asked, and remembers what it saw."""

    def __init__(self, num_threads: int, kind: str = "bf16") -> None:
        """kind: the format whose peak counts."""
        self._num_threads = num_threads
        self._kind = KINDS[kind]
        self._library = _library()
        self._buffer = None if self._library else torch.ones(BUFFER_BYTES // 4)
        self.readings: list[Reading] = []

    def look(self) -> Reading:
        """Takes some tenths of a second on every core."""
        if self._library:
            reading = self._ask_library(self._library)
        else:
            reading = Reading(bytes_per_s=self._read(), operations_per_s=self._multiply())
        self.readings.append(reading)
        return reading

    def params(self) -> Mapping[str, Param]:
        """For a row: medians since the probe was made."""
        return {
            READ_PROBE: round(statistics.median(reading.bytes_per_s for reading in self.readings) / 1e9, 2),
            PEAK_PROBE: round(statistics.median(reading.operations_per_s for reading in self.readings) / 1e9, 1),
        }

    def _ask_library(self, library: Any) -> Reading:
        library.set_num_threads(self._num_threads)
        # Without instructions for the format, numbers are widened first: then float32's peak is the limit.
        peak = max(library.probe_peak(library.Format[name]) for name in {self._kind, "FLOAT32"})
        return Reading(bytes_per_s=library.probe_read_bandwidth(NUM_REPEATS), operations_per_s=peak)

    def _read(self) -> float:
        assert self._buffer is not None
        seconds = _with_threads(self._num_threads, lambda: self._buffer.sum() if self._buffer is not None else None)
        return BUFFER_BYTES / seconds

    def _multiply(self) -> float:
        dtypes = {torch.float32} if self._kind == "FLOAT32" else {torch.float32, torch.bfloat16}
        rates = []
        for dtype in dtypes:
            matrix = torch.ones(MATRIX_SIZE, MATRIX_SIZE, dtype=dtype)
            seconds = _with_threads(self._num_threads, lambda matrix=matrix: matrix @ matrix)
            rates.append(2 * MATRIX_SIZE**3 / seconds)
        return max(rates)


def _with_threads(num_threads: int, action: Any) -> float:
    """Seconds of the best of NUM_REPEATS."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        times = []
        for _ in range(NUM_REPEATS):
            start = time.perf_counter()
            action()
            times.append(time.perf_counter() - start)
        return min(times)
    finally:
        torch.set_num_threads(before)


def _library() -> Any | None:
    """The native library, if it is built and has the probes."""
    try:
        library = importlib.import_module(LIBRARY)
    except ImportError:
        return None
    return library if hasattr(library, "probe_peak") and library.instruction_set() else None
