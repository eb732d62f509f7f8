import numpy as np
import pytest
import torch

from protos.memory import Memory, RawMatrix, as_tensor


def test_a_part_lies_where_it_says_and_a_part_of_it_within():
    whole = bytearray(range(64))
    part = Memory.of(memoryview(whole)).part(16, 40).part(8, 4)
    assert bytes(part.view) == bytes((24, 25, 26, 27))
    assert part.address == np.frombuffer(whole, dtype=np.uint8)[24:].ctypes.data
    part.view[0] = 99
    assert whole[24] == 99


@pytest.mark.parametrize(("offset", "num_bytes"), [(-1, 2), (0, 9), (9, 0), (4, 5), (4, -1)])
def test_a_part_that_does_not_lie_within_is_a_fault(offset, num_bytes):
    with pytest.raises(AssertionError):
        Memory.of(bytes(8)).part(offset, num_bytes)


def test_memory_without_bytes_has_parts_and_matrices_without_numbers():
    nothing = Memory.of(b"").part(0, 0)
    assert nothing.view == b""
    assert RawMatrix(nothing, (0, 5), torch.bfloat16).tensor().shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_is_what_a_tensor_in_place_is(dtype):
    memory = Memory.of(memoryview(bytearray(100))).part(4, 6 * dtype.itemsize)
    matrix = RawMatrix(memory, (2, 3), dtype)
    tensor = as_tensor(matrix)
    assert (tensor.shape, tensor.dtype, tensor.data_ptr()) == (matrix.shape, matrix.dtype, matrix.data_ptr())
    assert tensor.is_contiguous()
    assert matrix.is_contiguous()
    tensor.copy_(torch.arange(6).view(2, 3))
    assert as_tensor(matrix).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert as_tensor(tensor) is tensor
