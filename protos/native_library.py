"""Finds the plain C libraries that are compiled when the package is installed. ctypes lets go of the GIL in a call.

Knows nothing of what is in them.
"""

import ctypes
import importlib.machinery
import logging
from pathlib import Path

logger = logging.getLogger(__name__)
NOT_BUILT = "not built; install again where there is a C++ compiler"


def load(directory: Path, abi_function: str, abi: int) -> ctypes.CDLL | None:
    """The library in `directory`, or None where it was not built, cannot be loaded, or its `abi_function` returns
    another number.
    """
    found = _find(directory, abi_function, abi)
    if not isinstance(found, str):
        return found
    if found != NOT_BUILT:
        logger.warning("the library in %s is %s", directory, found)
    return None


def why_not(directory: Path, abi_function: str, abi: int) -> str | None:
    """What the library is where `load` gives none, to follow "is" or "are"; None where it gives one."""
    found = _find(directory, abi_function, abi)
    return found if isinstance(found, str) else None


def _find(directory: Path, abi_function: str, abi: int) -> ctypes.CDLL | str:
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = directory / f"library{suffix}"
        if path.is_file():
            try:
                library = ctypes.CDLL(str(path))
            except OSError as error:  # cut off, of another processor, or of a system with a newer libc
                return f"there but cannot be loaded ({error}); install again"
            if getattr(library, abi_function, lambda: 0)() == abi:
                return library
            return "built from other sources; install again"
    return NOT_BUILT
