"""Runs a test once with each instruction set that this processor has."""

from collections.abc import Iterator

import pytest

from experts.kernels.library import instruction_set, native

NAMES = ("amx", "avx512bf16", "avx512vnni", "avx2", "portable")
needs_kernels = pytest.mark.skipif(native() is None, reason="the CPU kernels are not built")


@pytest.fixture(params=NAMES)
def each_instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    library, best = native(), instruction_set()
    if library is None or best is None:
        pytest.skip("the CPU kernels are not built")
    if library.mobula_use_instruction_set(request.param.encode()):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    library.mobula_use_instruction_set(best.encode())
