"""Layers without what nobody can be asked for, by a clock that stands still between events."""

import pytest
import torch

from router.router_config import MissingExperts, RouterConfig
from router.step_limit import StepLimit
from tests.fake_experts import Rows, grouped_gate, multiplied, placed, random_rows
from tests.router.timed_shards import TimedShards

GATE = grouped_gate()
CONFIG = RouterConfig(forward_timeout_s=60.0, attempt_timeout_s=20.0, late_after_s=0.05)
ROWS = random_rows(GATE, 8, hidden_size=4)


def combine(shards: TimedShards) -> float:
    """Seconds of a layer, whose sums must be right."""
    sums, seconds = shards.combine(ROWS)
    torch.testing.assert_close(sums, multiplied(ROWS))
    return seconds


@pytest.mark.parametrize("policy", [MissingExperts.LEAVE_OUT, MissingExperts.RENORMALISE])
def test_degraded_mode_leaves_out_what_nobody_has_and_says_so(policy):
    config = CONFIG.model_copy(update={"missing_experts": policy, "missing_after_s": 1.0})
    alone = TimedShards(GATE, placed(GATE, 2), config)
    combine(alone)
    alone.transports[1].seconds = None
    told: list[None] = []
    alone.router.limit_step(StepLimit(allows_missing_experts=True, on_missing_experts=lambda: told.append(None)))
    sums, seconds = alone.combine(ROWS)
    assert 1.0 <= seconds < 1.2
    assert told == [None]
    units = placed(GATE, 2)
    is_there = torch.from_numpy((units.unit_to_ep_ranks[0, units.expert_to_unit[0], 0] == 0)[ROWS.topk_ids.numpy()])
    weights = ROWS.topk_weights * is_there
    expected = multiplied(Rows(ROWS.hidden_states, weights, ROWS.topk_ids))
    if policy is MissingExperts.RENORMALISE:
        expected *= (ROWS.topk_weights.sum(dim=1) / weights.sum(dim=1)).nan_to_num(posinf=1.0).unsqueeze(1)
    torch.testing.assert_close(sums, expected)
    assert alone.router._metrics._num_missing == int((~is_there).sum())


@pytest.mark.parametrize(("policy", "allows"), [(MissingExperts.WAIT, True), (MissingExperts.LEAVE_OUT, False)])
def test_experts_are_waited_for_unless_the_deployment_and_the_requests_allow_otherwise(policy, allows):
    config = CONFIG.model_copy(update={"missing_experts": policy, "missing_after_s": 1.0})
    alone = TimedShards(GATE, placed(GATE, 2), config)
    alone.transports[1].seconds = 5.0
    alone.router.limit_step(StepLimit(allows_missing_experts=allows))
    assert combine(alone) == pytest.approx(5.0, abs=0.01)
    assert alone.router._metrics._num_missing == 0


def test_degraded_mode_waits_for_an_answer_that_takes_long_but_no_longer_than_usual():
    config = CONFIG.model_copy(update={"missing_experts": MissingExperts.LEAVE_OUT, "missing_after_s": 1.0})
    alone = TimedShards(GATE, placed(GATE, 2), config)
    for transport in alone.transports:
        transport.seconds = 3.0
    alone.router.limit_step(StepLimit(allows_missing_experts=True))
    for _ in range(5):
        assert combine(alone) == pytest.approx(3.0, abs=0.01)
    assert alone.router._metrics._num_missing == 0


def test_the_layers_after_one_that_did_without_a_shard_do_so_at_once_until_it_is_heard_of_again() -> None:
    config = CONFIG.model_copy(update={"missing_experts": MissingExperts.LEAVE_OUT, "missing_after_s": 1.0})
    alone = TimedShards(GATE, placed(GATE, 2), config)
    combine(alone)
    usual_s = alone.transports[1].seconds
    alone.router.limit_step(StepLimit(allows_missing_experts=True))
    alone.transports[1].seconds = None
    assert alone.combine(ROWS)[1] >= 1.0
    for _ in range(50):
        assert alone.combine(ROWS)[1] < 0.05
    alone.transports[1].seconds = usual_s
    assert alone.combine(ROWS)[1] < 0.05  # asked, but not waited for
    alone.clock.now_s += 1.0  # its answer comes
    for _ in range(5):
        combine(alone)


def test_requests_that_want_every_expert_wait_for_a_shard_that_others_did_without() -> None:
    config = CONFIG.model_copy(update={"missing_experts": MissingExperts.LEAVE_OUT, "missing_after_s": 1.0})
    alone = TimedShards(GATE, placed(GATE, 2), config)
    combine(alone)
    alone.router.limit_step(StepLimit(allows_missing_experts=True))
    alone.transports[1].seconds = None
    alone.combine(ROWS)
    alone.router.limit_step(StepLimit())
    alone.transports[1].seconds = 5.0
    assert combine(alone) == pytest.approx(5.0, abs=0.01)
