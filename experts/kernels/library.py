"""The compiled library: its functions declared, its threads set.

Every pointer that a call takes must stay alive until it returns; whoever makes the call sees to that.
"""

import ctypes
from ctypes import POINTER, c_char_p, c_double, c_int, c_int32, c_long, c_size_t, c_void_p
from enum import IntEnum
from functools import cache
from pathlib import Path

import torch

from protos import native_library

ABI = 6  # kAbi in native/kernels.h
NATIVE = (Path(__file__).parent / "native", "mobula_abi", ABI)
PROBE_BYTES = 256 * 2**20  # read by the bandwidth probe; larger than any cache


class Format(IntEnum):
    """How numbers are stored; as in native/kernels.h."""

    FLOAT32 = 0
    BFLOAT16 = 1
    INT8 = 2
    INT4 = 3
    COMPACT = 4  # bfloat16 in 12 bits, without loss: native/compact.h


_CALLS = (  # each takes its struct as bytes: packing them is faster than a ctypes.Structure
    "linear",
    "heads",
    "rms_norm",
    "select_experts",
    "mla_prepare",
    "mla_decode",
    "mla_prefill",
)
_FORMATS = {torch.float32: Format.FLOAT32, torch.bfloat16: Format.BFLOAT16}


class CMatrix(ctypes.Structure):
    """struct Matrix."""

    _fields_ = (
        ("data", c_void_p),
        ("scales", c_void_p),
        ("dictionaries", c_void_p),
        ("format", c_int32),
        ("num_outputs", c_int32),
        ("num_inputs", c_int32),
        ("group_size", c_int32),
    )


@cache
def native() -> ctypes.CDLL | None:
    """The library, or None where it was not built or cannot be used."""
    library = native_library.load(*NATIVE)
    return None if library is None else _declared(library)


def why_not() -> str | None:
    """What the kernels are where `native` gives none, to follow "are"; None where it gives one."""
    return native_library.why_not(*NATIVE)


def require() -> ctypes.CDLL:
    """The library. Raises RuntimeError where there is none."""
    library = native()
    if library is None:
        raise RuntimeError(f"the CPU kernels are {why_not()}")
    return library


def instruction_set() -> str | None:
    """What the kernels use on this processor, e.g. "avx512bf16"; None without the library."""
    library = native()
    return None if library is None else library.mobula_instruction_set().decode()


def set_num_threads(count: int) -> None:
    """Threads of the kernels, the caller's included. Without the library nothing happens."""
    if (library := native()) is not None:
        library.mobula_set_num_threads(count)


def format_of(dtype: torch.dtype) -> Format:
    """Of activations: float32 or bfloat16. Raises KeyError."""
    return _FORMATS[dtype]


def probe_read_bandwidth(num_repeats: int = 1) -> float:
    """Bytes a second that the kernels' threads read from memory: the best of `num_repeats`."""
    data = torch.ones(PROBE_BYTES, dtype=torch.uint8)
    return max(float(require().mobula_probe_read(data.data_ptr(), PROBE_BYTES)) for _ in range(num_repeats))


def probe_peak(number_format: Format, iterations: int = 20000) -> float:
    """Operations a second of the kernels' threads on operands in cache; a multiplication with addition counts two."""
    peak: float = require().mobula_probe_peak(number_format, iterations)
    return peak


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    library.mobula_instruction_set.restype = c_char_p
    library.mobula_use_instruction_set.argtypes = [c_char_p]
    library.mobula_set_num_threads.argtypes = [c_int]
    library.mobula_num_threads.restype = c_int
    for name in _CALLS:
        function = getattr(library, f"mobula_{name}")
        function.argtypes = [c_char_p]
        function.restype = None
    library.mobula_experts.argtypes = [c_char_p, c_char_p]
    library.mobula_experts.restype = None
    library.mobula_mla_layer.argtypes = [c_void_p, c_char_p, c_char_p]
    library.mobula_mla_layer.restype = None
    library.mobula_accepts_assignments.argtypes = [c_char_p, c_char_p]
    library.mobula_probe_read.argtypes = [c_void_p, c_size_t]
    library.mobula_probe_read.restype = c_double
    library.mobula_probe_peak.argtypes = [c_int, c_long]
    library.mobula_probe_peak.restype = c_double
    library.mobula_pack.argtypes = [c_void_p, c_void_p, POINTER(CMatrix), c_int, c_int]
    library.mobula_pack.restype = None
    library.mobula_choose_dictionaries.argtypes = [c_void_p, POINTER(CMatrix), c_int, c_int, c_int]
    library.mobula_choose_dictionaries.restype = c_int
    library.mobula_pack_compact.argtypes = [c_void_p, POINTER(CMatrix), c_int, c_int]
    library.mobula_pack_compact.restype = None
    return library
