"""Checks a forward's assignments in one call; experts/forward_frame.py says in numpy what is wrong with bad ones."""

import ctypes
from ctypes import c_int32, c_void_p

import numpy as np
import numpy.typing as npt

from experts.kernels.library import native


class _AssignmentsCheck(ctypes.Structure):
    _fields_ = (
        ("assignments", c_void_p),
        ("expert_to_unit", c_void_p),
        ("num_assignments", c_int32),
        ("num_experts", c_int32),
        ("num_rows", c_int32),
        ("num_partial_sums", c_int32),
    )


def kernel_accepts(
    assignments: npt.NDArray[np.int32], expert_to_unit: npt.NDArray[np.int64], num_rows: int, num_partial_sums: int
) -> bool:
    """Whether all is as forward_frame.check_assignments wants it; False also where the library is not built.

    assignments: [4, A]; expert_to_unit: [n_routed_experts], -1 for experts that are not held; both contiguous.
    """
    library = native()
    if library is None:
        return False
    call = _AssignmentsCheck(
        assignments.ctypes.data,
        expert_to_unit.ctypes.data,
        assignments.shape[1],
        len(expert_to_unit),
        num_rows,
        num_partial_sums,
    )
    return bool(library.mobula_accepts_assignments(ctypes.addressof(call)))
