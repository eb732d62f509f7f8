"""The router's compiled library: found, its functions declared. Needs no torch."""

import ctypes
from ctypes import c_void_p
from functools import cache
from pathlib import Path

from protos import native_library

ABI = 4  # kAbi in native/plan.cpp


@cache
def native() -> ctypes.CDLL | None:
    """The library, or None where it was not built."""
    library = native_library.load(Path(__file__).parent / "native", "mobula_plan_abi", ABI)
    if library is not None:
        for function in (library.mobula_plan, library.mobula_choose_replicas, library.mobula_sum_partials):
            function.argtypes = [c_void_p]
    return library
