"""Placements are computed from the first part of a trace and scored on the rest."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.placement import POLICIES, PlacementRequest, place_units
from router.trace.model_shape import V2
from router.trace.replay import ReplayCase, ReplaySettings, num_held_experts, replay, steps
from router.trace.synthetic import Skew, SyntheticTrace
from router.trace.trace import TraceError
from router.trace.traffic import count_traffic
from tests.router.trace.traces import random_ids, tiny_model, trace_of

STATIC = ReplayCase(policy="static", ep_size=2)


def test_traffic_counts_assignments_and_pairs_of_the_first_tokens_only() -> None:
    model = tiny_model(layers=1, top_k=3, is_limited=False)
    first = np.array([[[0, 1, 2], [0, 1, 7]]], dtype=np.uint8)
    trace = trace_of(model, first, np.array([[[0, 1, 3], [4, 5, 6]]], dtype=np.uint8))
    traffic = count_traffic(trace, 3)
    assert traffic.load.tolist() == [[3, 3, 1, 1, 0, 0, 0, 1]]
    assert traffic.coactivation[0, 0].tolist() == [0, 3, 1, 1, 0, 0, 0, 1]
    np.testing.assert_array_equal(traffic.coactivation, traffic.coactivation.swapaxes(1, 2))


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    first_token=st.integers(0, 40),
    step_tokens=st.integers(1, 12),
)
def test_steps_are_the_tokens_after_the_first_in_order_across_windows(
    sizes: list[int], first_token: int, step_tokens: int
) -> None:
    model = tiny_model()
    parts = [random_ids(model, size, seed=number) for number, size in enumerate(sizes)]
    rest = np.concatenate(parts, axis=1)[:, first_token:]
    found = list(steps(trace_of(model, *parts), first_token, step_tokens))
    if not rest.shape[1]:
        assert found == []
        return
    if rest.shape[1] < step_tokens:
        assert len(found) == 1
    else:
        assert [step.shape[1] for step in found] == [step_tokens] * (rest.shape[1] // step_tokens)
        rest = rest[:, : rest.shape[1] // step_tokens * step_tokens]
    np.testing.assert_array_equal(np.concatenate(found, axis=1), rest)


def test_what_is_scored_is_not_what_was_placed_by() -> None:
    # the first half is all on group 0, the second on group 3: with two shards of static units the other one works
    model = tiny_model(layers=1)
    first, second = np.full((1, 4, 2), (0, 1), dtype=np.uint8), np.full((1, 4, 2), (0, 7), dtype=np.uint8)
    result = replay(trace_of(model, first, second), [STATIC], ReplaySettings(step_tokens=4))[0]
    assert result.score is not None
    assert result.score.ranks_per_token_mean == 2.0
    assert result.moved_bytes == 0, "it is the placement a cluster starts with"
    assert result.weight_bytes == 4 * model.expert_bytes


def test_every_policy_replays_v2_or_says_why_not() -> None:
    trace = SyntheticTrace(V2, Skew.parse("zipf"), num_tokens=256, seed=0)
    cases = [ReplayCase(policy=name, ep_size=8, redundancy=0.25) for name in POLICIES]
    for result in replay(trace, cases, ReplaySettings(step_tokens=64)):
        assert (result.score is None) == bool(result.error)
        if result.score is not None:
            assert 0 < result.score.balancedness_total <= 1
            assert result.score.ranks_per_token_max <= (6 if result.case.policy == "eplb" else 3)


def test_a_rebalance_moves_less_than_placing_anew_and_static_moves_nothing() -> None:
    trace = SyntheticTrace(V2, Skew.parse("zipf"), num_tokens=512, seed=0)
    cases = [ReplayCase(policy=name, ep_size=12) for name in ("static", "device_limited")]
    anew = [result.moved_bytes for result in replay(trace, cases)]
    rebalanced = [result.moved_bytes for result in replay(trace, cases, ReplaySettings(is_rebalance=True))]
    assert anew[0] == rebalanced[0] == 0
    assert 0 < rebalanced[1] < anew[1] / 2


def test_a_case_without_a_placement_is_an_error_of_its_own() -> None:
    trace = trace_of(tiny_model(), random_ids(tiny_model(), 8, seed=0))
    fits, too_many = replay(trace, [STATIC, replace(STATIC, num_replicas=3)])
    assert fits.score is not None
    assert too_many.score is None
    assert "num_replicas is 3, must be 1 to ep_size (2)" in too_many.error


def test_progress_is_told_from_nothing_to_all() -> None:
    told: list[tuple[str, float]] = []
    trace = trace_of(tiny_model(), random_ids(tiny_model(), 8, seed=0))
    replay(trace, [STATIC], ReplaySettings(step_tokens=2), lambda stage, done: told.append((stage, done)))
    assert [stage.split()[0] for stage, _ in told] == ["counting", "placing", "scoring", "scoring"]
    assert told[0][1] == told[-1][1] == 1.0


def test_experts_that_shards_hold_count_each_replica() -> None:
    request = PlacementRequest(moe_layer_ids=(1, 2), gate=tiny_model().gate, ep_size=3, num_replicas=2)
    expert_map = place_units(request)
    expected = [sum(len(unit.expert_ids) for unit in expert_map.units_of(rank)) for rank in range(3)]
    assert num_held_experts(expert_map).tolist() == expected
    assert sum(expected) == 2 * 8 * 2


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ({"policy": "best", "ep_size": 8}, "policy is 'best', known are static"),
        ({"policy": "static", "ep_size": 0}, "shards is 0, must be 1 to 4096"),
        ({"policy": "static", "ep_size": 8, "redundancy": -0.1}, "redundancy is -0.1, must be 0 to 7"),
        ({"policy": "static", "ep_size": 8, "redundancy": float("nan")}, "redundancy is nan"),
    ],
)
def test_a_case_that_cannot_be_is_refused(case: dict[str, object], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        ReplayCase(**case)  # type: ignore[arg-type]


def test_settings_and_traces_that_cannot_be_replayed_are_refused() -> None:
    with pytest.raises(TraceError, match="step_tokens is 0, must be 1 to 65536"):
        ReplaySettings(step_tokens=0)
    with pytest.raises(TraceError, match=r"training_share is 1.0, must be between 0 and 1"):
        ReplaySettings(training_share=1.0)
    with pytest.raises(TraceError, match="the trace has 1 tokens, at least 2 are needed"):
        replay(trace_of(tiny_model(), random_ids(tiny_model(), 1, seed=0)), [STATIC])
