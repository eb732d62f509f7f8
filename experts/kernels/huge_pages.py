"""Weights in pages of 2 MiB: a processor that reads them in a row needs fewer entries of its page tables.

Linux gives them to whoever asks, where /sys/kernel/mm/transparent_hugepage/enabled is "madvise" or "always". It is all
advice: where it is not taken, weights lie in ordinary pages.
"""

import ctypes
import sys
from collections.abc import Callable
from functools import cache
from mmap import PAGESIZE
from pathlib import Path

from torch import Tensor

PAGE_BYTES = 2 * 2**20
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25


def ask_for(memory: Tensor) -> None:
    """Before anybody touches the memory, whose pages are then huge where they lie whole in it."""
    if _is_worth_it(memory):
        start = memory.data_ptr() // PAGESIZE * PAGESIZE
        _advise(start, memory.data_ptr() + memory.nbytes - start, _MADV_HUGEPAGE)


def gather(memory: Tensor) -> None:
    """Once it is written: pages at its ends, which it shares with neighbours that were asked for too, become huge."""
    if _is_worth_it(memory):
        first = memory.data_ptr() // PAGE_BYTES * PAGE_BYTES
        for start in range(first, memory.data_ptr() + memory.nbytes, PAGE_BYTES):
            _advise(start, PAGE_BYTES, _MADV_COLLAPSE)


@cache
def are_allowed(setting: Path = SETTING) -> bool:
    """Whether the machine has them for who asks."""
    try:
        return sys.platform == "linux" and "[never]" not in setting.read_text(encoding="utf-8")
    except OSError:
        return False


def _is_worth_it(memory: Tensor) -> bool:
    return memory.nbytes >= PAGE_BYTES // 2 and are_allowed()


def _advise(start: int, num_bytes: int, advice: int) -> None:
    _madvise()(start, num_bytes, advice)


@cache
def _madvise() -> Callable[[int, int, int], int]:
    function: Callable[[int, int, int], int] = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)  # type: ignore[attr-defined]
    return function
