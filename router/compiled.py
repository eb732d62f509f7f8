"""The router's compiled library: found, its functions declared. Needs no torch."""

import ctypes
from ctypes import c_char_p, c_void_p
from functools import cache
from pathlib import Path

from protos import native_library

ABI = 5  # kAbi in native/plan.cpp
NATIVE = (Path(__file__).parent / "native", "mobula_plan_abi", ABI)


@cache
def native() -> ctypes.CDLL | None:
    """The library, or None where it was not built or cannot be used."""
    library = native_library.load(*NATIVE)
    if library is not None:
        library.mobula_plan.argtypes = [c_char_p]
        library.mobula_write_payload.argtypes = [c_char_p]
        library.mobula_write_payload.restype = None
        library.mobula_choose_replicas.argtypes = [c_void_p]
        library.mobula_sum_partials.argtypes = [c_char_p, c_char_p]
    return library


def why_not() -> str | None:
    """What the library is where `native` gives none, to follow "is"; None where it gives one."""
    return native_library.why_not(*NATIVE)
