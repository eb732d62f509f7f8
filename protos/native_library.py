"""Finds the plain C libraries that are compiled when the package is installed. ctypes lets go of the GIL in a call.

Knows nothing of what is in them.
"""

import ctypes
import importlib.machinery
import logging
from pathlib import Path

logger = logging.getLogger(__name__)


def load(directory: Path, abi_function: str, abi: int) -> ctypes.CDLL | None:
    """The library in `directory`, or None where it was not built or its `abi_function` returns another number."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = directory / f"library{suffix}"
        if path.is_file():
            library = ctypes.CDLL(str(path))
            if getattr(library, abi_function, lambda: 0)() == abi:
                return library
            logger.warning("%s was built from other sources and is not used; install the package again", path)
    return None
