import re
from concurrent.futures import Future

import numpy as np
import pytest
import torch

from experts.shard import ExpertShard
from protos import expert_pb2, tensor_pb2
from protos.codec import decode_frame
from protos.errors import InvalidRequest
from protos.memory import Memory, as_tensor
from tests.fake_experts import expert_shard, grouped_gate, placed, small_model
from tests.frames import encode_frame

MODEL = small_model()
MAP = placed(grouped_gate(), 2, placement_version=3)  # layer 1: even units here, so experts 0 1 4 5 8 9 12 13
CODES = {"stale": 9, "invalid": 3, "unavailable": 14, "full": 8}


@pytest.fixture
def shard():
    shard = expert_shard(MAP, 0, MODEL)
    shard.start()
    yield shard
    shard.stop()


def forward_frame(**changes) -> bytes:
    """Two rows; row 0 to experts 0 and 1 (unit 0) and 4 (unit 2), row 1 to expert 4."""
    header = {
        "sequence_number": 77,
        "layer_id": 1,
        "placement_version": 3,
        "num_rows": 2,
        "num_assignments": 4,
        "num_partial_sums": 3,
        "dtype": tensor_pb2.DTYPE_FLOAT32,
    }
    tensors = {
        "hidden_states": torch.ones(2, MODEL.hidden_size),
        "weights": torch.ones(4),
        "rows": [0, 0, 0, 1],
        "expert_ids": [0, 1, 4, 4],
        "partial_sums": [0, 0, 1, 2],
    }
    header |= {name: value for name, value in changes.items() if name in header}
    tensors |= {name: value for name, value in changes.items() if name in tensors}
    return encode_frame(
        expert_pb2.ForwardHeader(**header),
        [
            value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.int32)
            for value in tensors.values()
        ],
    )


def result_of(shard: ExpertShard, frame: bytes) -> expert_pb2.ForwardResult:
    return decode_frame(expert_pb2.ForwardResult, shard.forward(frame).result(30))[0]


def test_a_forward_is_answered_with_its_partial_sums_and_timing(shard):
    answer = expert_pb2.ForwardResponse.FromString(shard.forward(forward_frame()).result(30))
    assert answer.header.sequence_number == 77
    assert not answer.header.HasField("error")
    assert answer.header.num_partial_sums == 3
    assert len(answer.payload) == 3 * MODEL.hidden_size * 4
    assert answer.header.timing.compute_ns > 0
    sums = torch.frombuffer(bytearray(answer.payload), dtype=torch.float32).view(3, -1)
    assert torch.equal(sums[1], sums[2])  # the same row through the same expert


def test_counted_load_is_what_was_computed(shard):
    for _ in range(3):
        shard.forward(forward_frame()).result(30)
    load = shard.load()
    assert load.num_tokens[0].tolist()[:6] == [3, 3, 0, 0, 6, 0]
    assert load.num_tokens.dtype == np.uint64
    assert (load.num_forwards, load.num_rows, load.num_assignments) == (3, 6, 12)
    assert load.num_tokens.sum() == 12


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"placement_version": 2}, "stale", r"version 2 is not served here, only \[3\]"),
        ({"expert_ids": [0, 1, 2, 4]}, "stale", r"experts \[2\] of layer 1 are not on this shard"),
        ({"layer_id": 3}, "invalid", "layer 3 has no routed experts"),
        ({"dtype": tensor_pb2.DTYPE_BFLOAT16}, "invalid", "bfloat16, this shard computes in torch.float32"),
        ({"dtype": tensor_pb2.DTYPE_UNSPECIFIED}, "invalid", "dtype 0"),
        ({"rows": [0, 0, 0, 2]}, "invalid", "row 2 is out of range, must be 0 to 1"),
        ({"rows": [-1, 0, 0, 1]}, "invalid", "row -1 is out of range"),
        ({"expert_ids": [0, 1, 4, 16]}, "invalid", "expert id 16 is out of range"),
        ({"expert_ids": [-1, 1, 4, 4]}, "invalid", "expert id -1 is out of range"),
        ({"expert_ids": [1, 0, 4, 4]}, "invalid", "do not ascend"),
        ({"expert_ids": [0, 0, 4, 4]}, "invalid", "do not ascend"),
        ({"partial_sums": [0, 1, 1, 2]}, "invalid", "do not number"),
        ({"partial_sums": [1, 1, 2, 3]}, "invalid", "do not number"),
        ({"num_partial_sums": 4}, "invalid", "num_partial_sums is 4, the assignments have 3"),
        ({"num_partial_sums": 4_000_000_000}, "invalid", "num_partial_sums is 4000000000"),
        ({"num_rows": 3}, "invalid", "bytes too few"),
        ({"num_rows": 4_000_000_000}, "invalid", "bytes too few"),
        ({"num_assignments": 3}, "invalid", "bytes too many"),
        ({"hidden_states": torch.ones(2, MODEL.hidden_size + 1)}, "invalid", "bytes too many"),
        ({"num_assignments": 0, "weights": torch.ones(0), "rows": [], "expert_ids": [], "partial_sums": []},
         "invalid", "3 partial sums have no assignments"),
    ],
)  # fmt: skip
def test_a_forward_that_asks_the_impossible_is_answered_with_a_named_error(shard, changes, code, message):
    result = result_of(shard, forward_frame(**changes))
    assert result.sequence_number == 77
    assert result.error.code == CODES[code]
    assert re.search(message, result.error.message), result.error.message
    assert shard.load().num_forwards == 0


@pytest.mark.parametrize(("num_rows", "num_assignments"), [(2**31, 0), (2**32 - 1, 0), (0, 2**31)])
def test_more_than_an_index_can_count_is_refused_although_the_memory_has_it(shard, num_rows, num_assignments):
    header = expert_pb2.ForwardHeader(
        sequence_number=1, layer_id=1, placement_version=3, num_rows=num_rows, num_assignments=num_assignments,
        dtype=tensor_pb2.DTYPE_FLOAT32,
    )  # fmt: skip
    num_bytes = num_rows * MODEL.hidden_size * 4 + 16 * num_assignments
    outcomes: list = []
    shard.submit(header, Memory(memoryview(b""), 0, 0, num_bytes), outcomes.append)
    assert isinstance(outcomes[0], InvalidRequest)
    assert f"{num_rows} rows and {num_assignments} assignments, limit is 2147483647" in str(outcomes[0])


def test_bytes_that_are_no_frame_are_the_callers_fault(shard):
    with pytest.raises(InvalidRequest, match="expected tag"):
        shard.forward(b"\x00nonsense")


def test_a_full_queue_is_said_in_the_answer():
    shard = expert_shard(MAP, 0, MODEL, max_waiting_forwards=1)  # not started: nothing is computed
    waiting = shard.forward(forward_frame())
    assert result_of(shard, forward_frame()).error.code == CODES["full"]
    waiting.cancel()
    shard.start()
    shard.stop()
    assert shard.load().num_forwards == 0  # dropped when its caller went
    assert result_of(shard, forward_frame()).error.code == CODES["unavailable"]


def test_a_forward_admitted_under_a_released_version_is_still_answered():
    shard = expert_shard(MAP, 0, MODEL)
    waiting = shard.forward(forward_frame())
    shard.release(3)
    assert result_of(shard, forward_frame()).error.code == CODES["stale"]
    assert (shard.num_units, shard.weight_bytes, shard.placement_versions) == (0, 0, ())
    shard.start()
    assert not decode_frame(expert_pb2.ForwardResult, waiting.result(30))[0].HasField("error")
    shard.stop()


def test_nan_goes_through_to_its_own_partial_sums(shard):
    hidden_states = torch.ones(2, MODEL.hidden_size)
    hidden_states[1] = float("nan")
    answer = expert_pb2.ForwardResponse.FromString(shard.forward(forward_frame(hidden_states=hidden_states)).result(30))
    sums = torch.frombuffer(bytearray(answer.payload), dtype=torch.float32).view(3, -1)
    assert sums.isnan().any(dim=-1).tolist() == [False, False, True]


def test_a_sender_that_changes_its_indices_after_they_were_checked_changes_nothing():
    shard = expert_shard(MAP, 0, MODEL)  # not started: the forward waits
    header, payload = decode_frame(expert_pb2.ForwardHeader, forward_frame())
    memory = memoryview(bytearray(payload))
    outcomes = []
    waiting = shard.submit(header, Memory.of(memory), outcomes.append)
    memory[2 * MODEL.hidden_size * 4 :] = b"\xff" * (4 * 16)
    assert waiting.forward.rows.tolist() == [0, 0, 0, 1]
    assert waiting.forward.expert_ids.tolist() == [0, 1, 4, 4]
    assert waiting.forward.weights.tolist() == [1.0] * 4
    shard.start()
    shard.stop()
    assert as_tensor(outcomes[0].partial_sums).isfinite().all()


def test_an_answer_is_computed_in_the_memory_that_the_caller_gave(shard):
    header, payload = decode_frame(expert_pb2.ForwardHeader, forward_frame())
    expected = decode_frame(expert_pb2.ForwardResult, shard.forward(forward_frame()).result(30))[1]
    memory = memoryview(bytearray(len(expected)))
    done = Future()
    shard.submit(header, Memory.of(payload), done.set_result, Memory.of(memory))
    assert done.result(30).partial_sums.shape == (3, MODEL.hidden_size)
    assert memory == expected
