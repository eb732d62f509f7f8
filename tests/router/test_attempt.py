import numpy as np
import pytest
import torch

from protos import expert_pb2, tensor_pb2
from protos.errors import InternalError, InvalidRequest
from protos.memory import Memory, as_tensor
from router.attempt import read_partial_sums
from router.completions import ForwardAnswer
from router.plan import ShardMessage

MESSAGE = ShardMessage(
    ep_rank=0, row_ids=np.arange(2), assignments=np.zeros((4, 2), dtype=np.int32), partial_sums=np.arange(2)
)
LIKE = torch.zeros(2, 4, dtype=torch.bfloat16)


def answer(num_bytes: int, **header: int) -> ForwardAnswer:
    values = {"num_partial_sums": 2, "dtype": tensor_pb2.DTYPE_BFLOAT16} | header
    return ForwardAnswer(expert_pb2.ForwardResult(**values), Memory.of(bytes(range(num_bytes))))


def test_partial_sums_are_read_in_place():
    values = as_tensor(read_partial_sums(MESSAGE, answer(16), LIKE).values)
    assert (values.shape, values.dtype) == ((2, 4), torch.bfloat16)
    assert values.view(torch.uint8).flatten().tolist() == list(range(16))


@pytest.mark.parametrize("num_bytes", [0, 15, 17, 32])
def test_an_answer_of_another_size_is_refused_with_both_sizes(num_bytes):
    with pytest.raises(InvalidRequest, match=rf"2 partial sums of 4 torch.bfloat16 have 16 bytes, got {num_bytes}"):
        read_partial_sums(MESSAGE, answer(num_bytes), LIKE)


@pytest.mark.parametrize("header", [{"num_partial_sums": 3}, {"dtype": tensor_pb2.DTYPE_FLOAT32}])
def test_an_answer_to_something_else_is_the_shards_fault(header):
    with pytest.raises(InternalError, match=r"expected 2 of torch\.bfloat16"):
        read_partial_sums(MESSAGE, answer(16, **header), LIKE)
