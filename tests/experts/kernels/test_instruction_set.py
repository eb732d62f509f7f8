"""Which instruction set computes if nobody asks for one."""

from pathlib import Path

from experts.kernels.library import instruction_set
from tests.experts.kernels.instruction_sets import NAMES, best_afterwards, needs_kernels, use_instruction_set


def is_intels() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "GenuineIntel" in cpuinfo.read_text()


@needs_kernels
def test_the_fastest_that_the_processor_has_is_taken_which_on_intels_is_not_avx512bf16() -> None:
    taken = instruction_set()
    slow = ["avx512bf16"] if is_intels() else []
    with best_afterwards():
        assert taken == next(name for name in NAMES if name not in slow and use_instruction_set(name))
