import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from protos import expert_pb2
from protos.codec import decode_frame
from protos.errors import (
    InternalError,
    InvalidRequest,
    QueueFull,
    ShardUnavailable,
    StalePlacement,
    Unavailable,
)
from router.completions import ForwardCall
from router.expert_map import ExpertMap
from router.local_transport import LocalTransport
from router.plan import NO_EXPERT, plan_layer
from router.router import Router
from router.router_config import RouterConfig
from tests.fake_experts import (
    MOE_LAYER_IDS,
    MultiplyingShard,
    Rows,
    greedy_gate,
    grouped_gate,
    multiplied,
    placed,
    random_placement,
    random_rows,
    reference_sums,
    router_to,
    running_shards,
    small_model,
)

GATE = grouped_gate()
CHECKSUM_BYTES = 5  # which only frames have
SHORT = RouterConfig(forward_timeout_s=0.05, attempt_timeout_s=0.02)


class SilentTransport:
    """A shard that takes everything and answers nothing, until `answer` is called."""

    def __init__(self, handle=None) -> None:
        self.address = "silent:1"
        self.is_connected = True
        self.calls: list[ForwardCall] = []
        self.cancelled: list[int] = []
        self.is_closed = False
        self._handle = handle

    def forward(self, call: ForwardCall) -> None:
        self.calls.append(call)

    def answer(self, index: int) -> None:
        LocalTransport(self._handle).forward(self.calls[index])

    def cancel(self, call: ForwardCall) -> None:
        self.cancelled.append(call.sequence_number)

    def close(self) -> None:
        self.is_closed = True


def local_router(shards, expert_map: ExpertMap, **options) -> Router:
    return router_to(
        options.pop("gate", GATE), expert_map, lambda address: LocalTransport(shards[int(address)], address), **options
    )


def combined(router: Router, rows: Rows, layer_id: int = 1) -> torch.Tensor:
    return router.combine(router.dispatch(layer_id, rows.hidden_states, rows.topk_weights, rows.topk_ids))


@given(num_tokens=st.integers(0, 10), ep_size=st.integers(1, 12), seed=st.integers(0, 1000))
@settings(max_examples=40)
def test_combine_of_dispatch_is_every_token_times_its_experts_factors(num_tokens, ep_size, seed):
    expert_map = random_placement(GATE, ep_size, seed)
    router = local_router([MultiplyingShard() for _ in range(ep_size)], expert_map)
    rows = random_rows(GATE, num_tokens, hidden_size=5, seed=seed)
    for layer_id in MOE_LAYER_IDS:
        torch.testing.assert_close(combined(router, rows, layer_id), multiplied(rows))
    assert router.stats().num_device_limit_violations == 0


def test_a_plan_is_judged_by_the_device_limit_of_its_own_placement():
    class Replacing(SilentTransport):
        """A placement on one shard is told while the first forward is on its way."""

        def forward(self, call: ForwardCall) -> None:
            super().forward(call)
            router.update_placement(placed(GATE, 1, placement_version=2), {0: "0"})

    router = router_to(GATE, placed(GATE, 8), lambda _: Replacing())
    rows = random_rows(GATE, 9, hidden_size=5)
    router.abandon(router.dispatch(1, rows.hidden_states, rows.topk_weights, rows.topk_ids))
    assert len(router.stats().num_tokens_by_ranks) > 2
    assert router.stats().max_ranks_per_token == 1
    assert router.stats().num_device_limit_violations == 0


def test_counted_bytes_are_the_plans_plus_headers():
    shards = [MultiplyingShard() for _ in range(3)]
    router = local_router(shards, placed(GATE, 3))
    rows = random_rows(GATE, 9, hidden_size=5)
    handle = router.dispatch(1, rows.hidden_states, rows.topk_weights, rows.topk_ids)
    messages = handle.plan.messages
    router.combine(handle)
    frames = [frame for shard in shards for frame in shard.frames]
    headers_and_payloads = [decode_frame(expert_pb2.ForwardHeader, frame) for frame in frames]
    assert router.stats().sent_bytes == sum(
        header.ByteSize() - CHECKSUM_BYTES + len(payload) for header, payload in headers_and_payloads
    )
    for message, shard in zip(messages, shards, strict=True):
        request = expert_pb2.ForwardRequest.FromString(shard.frames[0])
        assert len(request.payload) == message.num_rows * 5 * 4 + message.num_assignments * 16
        assert request.header.num_rows == message.num_rows
    received = sum(message.num_partial_sums * 5 * 4 for message in messages)
    assert received < router.stats().received_bytes < received + 64 * len(messages)
    assert router.stats().num_tokens_by_ranks == tuple(handle.plan.num_tokens_by_ranks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate", [grouped_gate(), greedy_gate()])
def test_every_placement_gives_the_bits_of_the_slow_reference(gate, dtype):
    model = small_model(dtype)
    rows = random_rows(gate, 7, model.hidden_size, seed=3, dtype=dtype)
    one_shard = placed(gate, 1)
    expected = reference_sums(rows, 2, one_shard.expert_to_unit[1], model)
    maps = [one_shard, placed(gate, 3), placed(gate, 8), placed(gate, 11, num_replicas=2)]
    maps += [random_placement(gate, ep_size, seed) for ep_size, seed in ((2, 0), (5, 1), (8, 2))]
    for expert_map in maps:
        with running_shards(expert_map, model) as shards:
            router = local_router([shard.forward for shard in shards], expert_map, gate=gate)
            for _ in range(2):  # replicas take turns
                assert torch.equal(combined(router, rows, layer_id=2), expected), expert_map.ep_size


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (ShardUnavailable("gone"), "shard_unavailable"),
        (Unavailable("draining"), "unavailable"),
        (StalePlacement("version 1 is not served"), "stale_placement"),
        (QueueFull("9 wait"), "queue_full"),
    ],
)
def test_a_forward_that_may_succeed_later_is_sent_again_and_counted(failure, reason):
    shards = [MultiplyingShard(), MultiplyingShard()]
    shards[1].fail_next = [failure, failure]
    registry = CollectorRegistry()
    router = local_router(shards, placed(GATE, 2), registry=registry)
    rows = random_rows(GATE, 6, hidden_size=4)
    torch.testing.assert_close(combined(router, rows), multiplied(rows))
    assert (len(shards[0].frames), len(shards[1].frames)) == (1, 3)
    assert registry.get_sample_value("mobula_expert_retries_total", {"dp_rank": "0", "reason": reason}) == 2


def test_a_dead_replica_is_replaced_by_the_other_within_the_layer():
    shards = [MultiplyingShard(), MultiplyingShard()]
    shards[0].fail_next = [ShardUnavailable("gone")]
    router = local_router(shards, placed(GATE, 2, num_replicas=2))
    rows = random_rows(GATE, 6, hidden_size=4)
    torch.testing.assert_close(combined(router, rows), multiplied(rows))
    assert len(shards[0].frames) == 1
    assert len(shards[1].frames) == 2


def test_a_forward_that_can_never_succeed_is_an_internal_error_with_shard_and_layer():
    shards = [MultiplyingShard(), MultiplyingShard()]
    shards[1].fail_next = [InvalidRequest("row 7 is out of range")]
    router = local_router(shards, placed(GATE, 2))
    with pytest.raises(InternalError, match=r"shard 1 at 1, .* layer 4: row 7 is out of range"):
        combined(router, random_rows(GATE, 6, hidden_size=4), layer_id=4)


@pytest.mark.parametrize("num_rows", [1, 6])
def test_a_shard_that_stays_down_is_named_with_layer_and_seconds(num_rows):
    shards = [MultiplyingShard()]
    router = router_to(GATE, placed(GATE, 1), lambda _: None, config=SHORT, addresses={})
    with pytest.raises(ShardUnavailable, match=r"shard 0 at no address did not answer for layer 2 within .* 0.05 s"):
        combined(router, random_rows(GATE, num_rows, hidden_size=4), layer_id=2)
    assert shards[0].frames == []


def test_a_silent_shard_is_asked_again_and_its_late_answer_is_still_good():
    shard = MultiplyingShard()
    silent = SilentTransport(shard)
    config = RouterConfig(forward_timeout_s=20.0, attempt_timeout_s=0.01)
    router = router_to(GATE, placed(GATE, 1), lambda _: silent, config=config)
    rows = random_rows(GATE, 3, hidden_size=4)
    handle = router.dispatch(1, rows.hidden_states, rows.topk_weights, rows.topk_ids)
    forward = silent.forward

    def forward_and_answer(call):
        forward(call)
        silent.answer(0)  # the first call was given up: ignored
        silent.answer(-1)

    silent.forward = forward_and_answer
    torch.testing.assert_close(router.combine(handle), multiplied(rows))
    assert silent.calls[0].is_given_up


def test_a_silent_shard_costs_forward_timeout_and_no_more():
    silent = SilentTransport()
    router = router_to(GATE, placed(GATE, 1), lambda _: silent, config=SHORT)
    with pytest.raises(ShardUnavailable, match="shard 0 at silent:1 did not answer for layer 1"):
        combined(router, random_rows(GATE, 3, hidden_size=4))
    assert all(call.is_given_up for call in silent.calls)
    assert silent.cancelled == [call.sequence_number for call in silent.calls]


def test_a_shard_that_comes_back_elsewhere_answers_the_waiting_forward():
    shard = MultiplyingShard()
    router = router_to(GATE, placed(GATE, 1), lambda address: LocalTransport(shard, address), addresses={})
    rows = random_rows(GATE, 3, hidden_size=4)
    handle = router.dispatch(1, rows.hidden_states, rows.topk_weights, rows.topk_ids)
    control = threading.Thread(target=router.update_placement, args=(placed(GATE, 1), {0: "back:1"}))
    control.start()
    torch.testing.assert_close(router.combine(handle), multiplied(rows))
    control.join()


def test_when_the_units_themselves_change_the_layer_starts_again_with_the_new_ones():
    gate = greedy_gate()
    old = placed(gate, 1)
    new = ExpertMap(
        placement_version=2,
        ep_size=2,
        moe_layer_ids=MOE_LAYER_IDS,
        expert_to_unit=np.tile(np.arange(16) // 4, (3, 1)),
        unit_to_ep_ranks=np.tile(np.arange(4) % 2, (3, 1)).reshape(3, 4, 1),
    )
    shards = [MultiplyingShard(), MultiplyingShard()]
    shards[0].fail_next = [StalePlacement("version 1 is not served")]
    router = local_router(shards, old, gate=gate, addresses={0: "0"})
    rows = random_rows(gate, 3, hidden_size=4)
    handle = router.dispatch(1, rows.hidden_states, rows.topk_weights, rows.topk_ids)
    router.update_placement(new, {0: "0", 1: "1"})
    torch.testing.assert_close(router.combine(handle), multiplied(rows))
    assert len(shards[1].frames) == 1
    expected = plan_layer(rows.topk_ids, rows.topk_weights, new.expert_to_unit[0], new.unit_to_ep_ranks[0, :, 0])
    assert handle.plan.partial_rows.tolist() == expected.partial_rows.tolist()


def test_an_older_placement_changes_nothing_and_unchanged_addresses_keep_their_transport():
    opened: list[SilentTransport] = []

    def connect(address: str) -> SilentTransport:
        opened.append(SilentTransport())
        opened[-1].address = address
        return opened[-1]

    router = router_to(GATE, placed(GATE, 2, placement_version=5), connect)
    router.update_placement(placed(GATE, 3, placement_version=4), {0: "9"})
    assert router.expert_map.placement_version == 5
    router.update_placement(placed(GATE, 2, placement_version=5), {0: "0", 1: "elsewhere"})
    assert [(transport.address, transport.is_closed) for transport in opened] == [
        ("0", False), ("1", True), ("elsewhere", False),
    ]  # fmt: skip
    assert router.wait_until_connected(0.0) == []


def test_the_oldest_version_is_that_of_a_handle_in_flight():
    shards = [MultiplyingShard((1, 2)), MultiplyingShard((1, 2))]
    router = local_router(shards, placed(GATE, 2))
    rows = random_rows(GATE, 4, hidden_size=4)
    handles = [router.dispatch(1, rows.hidden_states, rows.topk_weights, rows.topk_ids) for _ in range(2)]
    router.update_placement(placed(GATE, 2, placement_version=2), {0: "0", 1: "1"})
    assert router.oldest_placement_version == 1
    router.combine(handles[0])
    assert router.oldest_placement_version == 1
    router.abandon(handles[1])
    assert router.oldest_placement_version == 2
    combined(router, rows)
    assert router.oldest_placement_version == 2


def test_two_handles_may_be_in_flight_and_be_combined_in_any_order():
    router = local_router([MultiplyingShard() for _ in range(3)], placed(GATE, 3))
    first, second = (random_rows(GATE, 4, hidden_size=4, seed=seed) for seed in (1, 2))
    handles = [router.dispatch(1, r.hidden_states, r.topk_weights, r.topk_ids) for r in (first, second)]
    torch.testing.assert_close(router.combine(handles[1]), multiplied(second))
    torch.testing.assert_close(router.combine(handles[0]), multiplied(first))
    with pytest.raises(AssertionError, match="combined once"):
        router.combine(handles[0])


def test_closing_the_router_ends_a_combine_that_waits():
    router = router_to(GATE, placed(GATE, 1), lambda _: None, addresses={})
    rows = random_rows(GATE, 3, hidden_size=4)
    handle = router.dispatch(1, rows.hidden_states, rows.topk_weights, rows.topk_ids)
    router.close()
    with pytest.raises(Unavailable, match="shutting down"):
        router.combine(handle)


def test_an_assignment_that_is_left_out_is_sent_to_nobody_and_adds_nothing():
    shards = [MultiplyingShard() for _ in range(3)]
    router = local_router(shards, placed(GATE, 3))
    rows = random_rows(GATE, 4, hidden_size=4)
    rows.topk_ids[1] = NO_EXPERT
    rows.topk_ids[2, 1:] = NO_EXPERT
    rows.topk_weights[rows.topk_ids == NO_EXPERT] = float("nan")
    found = combined(router, rows)
    kept = Rows(rows.hidden_states, rows.topk_weights.nan_to_num(0.0), rows.topk_ids)
    torch.testing.assert_close(found, multiplied(kept))
    assert found[1].tolist() == [0.0] * 4
    headers = [decode_frame(expert_pb2.ForwardHeader, shard.frames[0])[0] for shard in shards if shard.frames]
    assert sum(header.num_assignments for header in headers) == 4 + 1 + 4
    rows.topk_ids[:] = NO_EXPERT
    assert combined(router, rows).tolist() == [[0.0] * 4] * 4
    assert router.stats().num_tokens_by_ranks[0] == 1 + 4


def test_nan_reaches_its_own_row_only():
    router = local_router([MultiplyingShard() for _ in range(3)], placed(GATE, 3))
    rows = random_rows(GATE, 4, hidden_size=4)
    rows.hidden_states[2] = float("nan")
    assert combined(router, rows).isnan().any(dim=-1).tolist() == [False, False, True, False]
