"""Late, silent and slow shards, by a clock that stands still between events: nothing here sleeps."""

import pytest
import torch

from protos.errors import (
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    MobulaError,
    ShardUnavailable,
    UnitQuarantined,
)
from router.router_config import RouterConfig
from router.shard_health import MAX_PROBE_INTERVAL_S, MIN_PROBE_INTERVAL_S, NUM_PUNCTUAL
from router.step_limit import StepLimit
from router.unit_trust import MIN_QUARANTINE_S
from tests.fake_experts import MultiplyingShard, Rows, grouped_gate, multiplied, placed, random_rows
from tests.router.timed_shards import TimedShards, TimedTransport

GATE = grouped_gate()
CONFIG = RouterConfig(forward_timeout_s=60.0, attempt_timeout_s=20.0, late_after_s=0.05)
ROWS = random_rows(GATE, 8, hidden_size=4)


@pytest.fixture
def shards() -> TimedShards:
    """Three of them, every unit on two, and times that are known."""
    shards = TimedShards(GATE, placed(GATE, 3, num_replicas=2), CONFIG)
    for _ in range(5):
        combine(shards)
    return shards


def combine(shards: TimedShards) -> float:
    """Seconds of a layer, whose sums must be right."""
    sums, seconds = shards.combine(ROWS)
    torch.testing.assert_close(sums, multiplied(ROWS))
    return seconds


def slow_of(shards: TimedShards) -> int:
    """A shard that is asked for something."""
    before = shards.num_calls()
    combine(shards)
    return int((shards.num_calls() - before).argmax())


def late_forwards(shards: TimedShards, ep_rank: int) -> int:
    return shards.router._metrics._late[ep_rank]


def test_a_silent_shard_costs_one_wait_and_then_gets_no_rows(shards):
    silent = slow_of(shards)
    shards.transports[silent].seconds = None
    assert combine(shards) == pytest.approx(0.06, abs=0.005)  # late_after_s and the replica's time
    before = shards.num_calls()
    for _ in range(20):
        assert combine(shards) == pytest.approx(0.01, abs=0.001)
    assert shards.num_calls()[silent] == before[silent]
    assert late_forwards(shards, silent) == 1
    assert shards.router._metrics._retries["late"] >= 1


def test_the_first_answer_counts_and_the_other_is_ignored(shards):
    slow = slow_of(shards)
    shards.transports[slow].seconds = 0.055  # late, but before the replica that is asked then
    assert combine(shards) == pytest.approx(0.055, abs=0.002)
    assert combine(shards) <= 0.06


def test_a_shard_that_was_stopped_and_goes_on_gets_rows_again(shards):
    stopped = slow_of(shards)
    transport = shards.transports[stopped]
    transport.seconds = None
    combine(shards)
    transport.seconds = 0.01
    transport.answer(transport.calls[-1])  # at last
    combine(shards)
    before = shards.num_calls()
    for _ in range(20):
        combine(shards)
    assert shards.num_calls()[stopped] > before[stopped]
    assert shards.router.quarantined_shards() == []


def test_a_replica_that_was_late_once_gets_rows_again_when_that_is_long_ago():
    shards = TimedShards(GATE, placed(GATE, 2, num_replicas=2), CONFIG)
    for _ in range(5):
        combine(shards)
    late = slow_of(shards)
    shards.transports[late].seconds = 0.055
    combine(shards)
    shards.transports[late].seconds = 0.01
    shards.clock.now_s += 0.1  # its answer arrives
    before = shards.num_calls()[late]
    for _ in range(20):
        shards.clock.now_s += 0.5
        combine(shards)
    assert shards.num_calls()[late] > before + 5


def test_a_shard_that_is_always_late_is_quarantined_and_probed_until_it_is_punctual_again(shards):
    slow = slow_of(shards)
    transport = shards.transports[slow]
    transport.seconds = 0.2
    seconds = [combine(shards) for _ in range(200)]
    assert shards.router.quarantined_shards() == [slow]
    assert max(seconds) < 0.1  # hedged
    assert sum(second > 0.02 for second in seconds) <= 6
    for _ in range(300):
        shards.clock.now_s += MAX_PROBE_INTERVAL_S / 20
        combine(shards)
    num_probes = len(transport.calls)
    transport.seconds = 0.01
    for _ in range(200):
        shards.clock.now_s += MAX_PROBE_INTERVAL_S / 20
        combine(shards)
    assert shards.router.quarantined_shards() == []
    assert len(transport.calls) > num_probes + NUM_PUNCTUAL


def test_a_quarantined_shard_is_asked_when_the_only_other_one_is_late(shards):
    slow = slow_of(shards)
    shards.transports[slow].seconds = 0.2
    while not shards.router.quarantined_shards():
        combine(shards)
    shards.transports[slow].seconds = 0.01
    shards.clock.now_s += 1.0  # the answers to late ones arrive
    combine(shards)
    next(transport for transport in shards.transports if transport is not shards.transports[slow]).seconds = None
    assert max(combine(shards) for _ in range(3)) < 0.3


def test_a_late_answer_is_asked_of_another_as_soon_as_one_is_there(shards):
    silent = slow_of(shards)
    others = [transport for transport in shards.transports if transport is not shards.transports[silent]]
    shards.transports[silent].seconds = None
    for transport in others:
        transport.is_connected = False
    shards.clock.after(1.0, lambda: [setattr(transport, "is_connected", True) for transport in others])
    assert 1.0 < combine(shards) < 1.2


def quarantined(shards: TimedShards) -> tuple[int, dict[int, str]]:
    """A shard that is so now, and all addresses."""
    slow = slow_of(shards)
    shards.transports[slow].seconds = 0.2
    while not shards.router.quarantined_shards():
        combine(shards)
    assert shards.router.quarantined_shards() == [slow]
    return slow, {ep_rank: str(ep_rank) for ep_rank in range(3)}


def test_a_quarantined_shard_that_leaves_is_quarantined_no_longer(shards: TimedShards):
    slow, addresses = quarantined(shards)
    others = {ep_rank: address for ep_rank, address in addresses.items() if ep_rank != slow}
    shards.router.update_placement(shards.router.expert_map, others)
    assert shards.router.quarantined_shards() == []  # without a forward too
    combine(shards)
    shards.router.update_placement(shards.router.expert_map, addresses)
    assert shards.router.quarantined_shards() == []


def test_another_shard_of_a_quarantined_ones_rank_starts_anew_and_the_others_stay_known(shards: TimedShards):
    slow, addresses = quarantined(shards)
    times = shards.router._ledger._times._estimates.copy()
    shards.transports.append(TimedTransport(shards.clock, MultiplyingShard(), "3"))
    shards.router.update_placement(shards.router.expert_map, addresses | {slow: "3"})
    assert shards.router.quarantined_shards() == []  # without a forward too
    combine(shards)
    assert shards.router.quarantined_shards() == []
    assert len(shards.transports[3].calls) > 0
    kept = shards.router._ledger._times._estimates
    assert {ep_rank for ep_rank in times if kept[ep_rank] is times[ep_rank]} == set(range(3)) - {slow}


def test_a_placement_with_the_same_addresses_forgets_nothing(shards: TimedShards):
    slow, addresses = quarantined(shards)
    shards.router.update_placement(shards.router.expert_map, addresses)
    combine(shards)
    assert shards.router.quarantined_shards() == [slow]


def test_probes_are_rare_and_delay_nobody(shards):
    slow = slow_of(shards)
    shards.transports[slow].seconds = 0.2
    while not shards.router.quarantined_shards():
        combine(shards)
    for _ in range(50):
        shards.clock.now_s += 1.0  # the answers to late ones arrive
        combine(shards)
    before = shards.num_calls()[slow]
    for _ in range(100):
        assert combine(shards) == pytest.approx(0.01, abs=0.001)
    assert shards.num_calls()[slow] <= before + 1 + 1.0 / MIN_PROBE_INTERVAL_S


def test_without_a_replica_a_late_answer_is_waited_for(shards):
    alone = TimedShards(GATE, placed(GATE, 2), CONFIG)
    alone.transports[1].seconds = 3.0
    for _ in range(3):
        assert combine(alone) == pytest.approx(3.0, abs=0.01)
    assert alone.num_calls().tolist() == [3, 3]
    alone.transports[1].seconds = None
    with pytest.raises(ShardUnavailable, match=r"shard 1 at 1 did not answer for layer 1 within .* 60"):
        alone.combine(ROWS)


def test_a_step_is_waited_for_until_the_latest_deadline_of_its_requests():
    alone = TimedShards(GATE, placed(GATE, 2), CONFIG)
    alone.transports[1].seconds = None
    alone.router.limit_step(StepLimit(deadline_s=alone.clock() + 3.0))
    with pytest.raises(DeadlineExceeded, match="every request of the step passed while layer 1 waited"):
        alone.combine(ROWS)
    assert alone.clock.now_s == pytest.approx(1003.0, abs=0.01)
    assert alone.transports[1].cancelled == [call.sequence_number for call in alone.transports[1].calls]


def test_a_step_that_nobody_wants_any_more_is_not_waited_for():
    alone = TimedShards(GATE, placed(GATE, 2), CONFIG)
    alone.transports[1].seconds = None
    alone.router.limit_step(StepLimit(is_wanted=lambda: alone.clock() < 1000.5))
    with pytest.raises(Cancelled):
        alone.combine(ROWS)
    assert alone.clock.now_s < 1000.7


def test_two_silent_shards_of_three_leave_what_only_they_have_to_wait(shards):
    for transport in shards.transports[:2]:
        transport.seconds = None
    with pytest.raises(ShardUnavailable):
        shards.combine(ROWS)
    assert shards.clock.now_s < 1000.0 + CONFIG.forward_timeout_s + 5.0


def test_a_replica_that_breaks_while_it_is_asked_instead_of_a_late_one_is_asked_again(shards):
    silent = slow_of(shards)
    shards.transports[silent].seconds = None
    for transport in shards.transports:
        transport.shard.fail_next = [ShardUnavailable("gone")]
    assert combine(shards) < 0.2


def test_a_shard_whose_sums_are_not_finite_is_found_out_by_a_replica_and_its_units_are_quarantined(shards):
    wrong = slow_of(shards)
    transport = shards.transports[wrong]
    transport.shard.factor = float("nan")
    combine(shards)
    units = shards.router.quarantined_units()
    assert {unit.ep_rank for unit in units} == {wrong}
    assert {(unit.layer_id, unit.reason) for unit in units} == {(1, "its sums are not finite where a replica's are")}
    for _ in range(3):  # until every unit of it was found out
        combine(shards)
    before = shards.num_calls()
    combine(shards)
    assert shards.num_calls()[wrong] == before[wrong]
    transport.shard.factor = 1.0
    shards.clock.now_s += MIN_QUARANTINE_S
    for _ in range(10):
        combine(shards)
    assert shards.num_calls()[wrong] > before[wrong]
    assert shards.router.quarantined_units() == []


def test_a_model_that_is_not_finite_quarantines_nobody(shards):
    for transport in shards.transports:
        transport.shard.factor = float("inf")
    sums, _ = shards.combine(ROWS)
    assert not sums.isfinite().any()
    assert shards.router.quarantined_units() == []


def test_a_row_that_was_not_finite_before_is_asked_of_nobody_else(shards):
    hidden_states = ROWS.hidden_states.clone()
    hidden_states[2] = float("nan")
    before = shards.num_calls().sum()
    sums, _ = shards.combine(Rows(hidden_states, ROWS.topk_weights, ROWS.topk_ids))
    assert sums.isnan().any(dim=1).nonzero().flatten().tolist() == [2]
    assert shards.num_calls().sum() - before <= 3


def test_units_that_a_shard_has_quarantined_itself_are_asked_of_others(shards):
    refusing = slow_of(shards)
    error = UnitQuarantined("do not give their known answers", unit_ids=tuple(range(8)))
    shards.transports[refusing].shard.fail_next = [error]
    combine(shards)
    before = shards.num_calls()
    for _ in range(5):
        combine(shards)
    assert shards.num_calls()[refusing] == before[refusing]
    assert {unit.ep_rank for unit in shards.router.quarantined_units()} == {refusing}


@pytest.mark.parametrize("error", [InternalError("its kernel failed"), InvalidRequest("row 7 is out of range")])
def test_a_forward_that_a_shard_fails_at_is_asked_of_others_and_its_units_are_quarantined(
    shards: TimedShards, error: MobulaError
):
    failing = slow_of(shards)
    shards.transports[failing].shard.fail_next = [error]
    assert combine(shards) == pytest.approx(0.02, abs=0.001)
    assert shards.router._metrics._retries[error.reason.lower()] >= 1
    assert {(unit.ep_rank, unit.reason) for unit in shards.router.quarantined_units()} == {(failing, str(error))}


def test_a_forward_that_every_replica_fails_at_is_asked_of_each_once(shards: TimedShards):
    before = shards.num_calls()
    for transport in shards.transports:
        transport.shard.fail_next = [InternalError("these rows break the kernel")] * 100
    with pytest.raises(InternalError, match=r"the last to ask, could not compute a forward of layer 1: these rows"):
        shards.combine(ROWS)
    assert (shards.num_calls() - before).sum() <= 2 * GATE.n_group  # of each unit, each of its replicas


def test_a_probe_that_fails_fails_nobody(shards: TimedShards):
    slow = slow_of(shards)
    shards.transports[slow].seconds = 0.2
    while not shards.router.quarantined_shards():
        combine(shards)
    shards.transports[slow].seconds = 0.005
    shards.transports[slow].shard.fail_next = [InternalError("its kernel failed")]
    for _ in range(10):
        shards.clock.now_s += 1.0
        combine(shards)
    assert not shards.transports[slow].shard.fail_next


def test_a_probe_that_is_answered_after_its_layer_counts_all_the_same(shards: TimedShards):
    slow = slow_of(shards)
    shards.transports[slow].seconds = 0.2
    while not shards.router.quarantined_shards():
        combine(shards)
    shards.transports[slow].seconds = 0.012  # in time, but never before the others
    for _ in range(60):
        shards.clock.now_s += 1.0
        combine(shards)
        combine(shards)
    assert shards.router.quarantined_shards() == []
