"""Runs a test once with each instruction set that this processor has."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from experts.kernels.library import instruction_set, native

NAMES = ("amx", "avx512bf16", "avx512vnni", "avx2", "portable")
needs_kernels = pytest.mark.skipif(native() is None, reason="the CPU kernels are not built")


def use_instruction_set(name: str) -> bool:
    """Whether this processor has it; then it is used until another one is asked for."""
    library = native()
    return library is not None and library.mobula_use_instruction_set(name.encode()) == 0


@contextmanager
def best_afterwards() -> Iterator[None]:
    best = instruction_set()
    try:
        yield
    finally:
        if best is not None:
            use_instruction_set(best)


@pytest.fixture(params=NAMES)
def each_instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    if native() is None:
        pytest.skip("the CPU kernels are not built")
    with best_afterwards():
        if not use_instruction_set(request.param):
            pytest.skip(f"this processor has no {request.param}")
        yield request.param
