"""Checks a forward's assignments in one call; experts/forward_frame.py says in numpy what is wrong with bad ones."""

import struct

from experts.kernels.library import native

_CHECK = struct.Struct("P4I")  # struct AssignmentsCheck in native/assignments.cpp


def kernel_accepts(
    assignments: bytes, expert_to_unit_address: int, num_experts: int, num_rows: int, num_partial_sums: int
) -> bool:
    """Whether all is as forward_frame.check_assignments wants it; False also where the library is not built.

    assignments: of [4, A] int32; expert_to_unit_address: of [num_experts] int64, -1 for experts that are not held.
    """
    library = native()
    if library is None:
        return False
    check = _CHECK.pack(expert_to_unit_address, len(assignments) // 16, num_experts, num_rows, num_partial_sums)
    return bool(library.mobula_accepts_assignments(check, assignments))
