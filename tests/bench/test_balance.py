"""The page on balance: its bound, its goals and its picture, on traffic made by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from router.trace.replay import ReplayCase, replay
from router.trace.trace import id_dtype
from tests.bench.balance import Ungrouped
from tests.bench.balance_goals import ZIPF, coolest_possible, goals
from tests.bench.drift import MINUTES, STEPS_PER_MINUTE, draw, drifted
from tests.router.trace.traces import random_ids, tiny_model, trace_of

MODEL = tiny_model()  # two layers of eight experts in four groups, two a token


def of_experts(*experts: int, num_tokens: int) -> np.ndarray:
    """Every token asks the same ones in every layer."""
    ids = np.tile(np.sort(experts), (MODEL.num_moe_layers, num_tokens, 1))
    return ids.astype(id_dtype(MODEL.gate.n_routed_experts))


def test_the_bound_gives_replicas_to_the_hottest_unit_first() -> None:
    trace = trace_of(MODEL, of_experts(0, 1, num_tokens=8))  # all load on group 0: 4 times an even share
    bounds = coolest_possible(trace, (0.0, 0.25, 0.75))
    assert bounds == pytest.approx({0.0: 4.0, 0.25: 2.0, 0.75: 1.0}, abs=0.05)


def test_a_trace_without_its_groups_may_be_cut_anywhere() -> None:
    trace = Ungrouped(trace_of(MODEL, random_ids(MODEL, 64, 0)))
    assert not trace.header.model.gate.is_group_limited
    (result,) = replay(trace, [ReplayCase(policy="coactivation", ep_size=4)])
    assert result.score is not None


def test_goals_say_the_worst_case_and_whether_it_is_met() -> None:
    trace = trace_of(MODEL, random_ids(MODEL, 256, 0))
    cases = [
        ReplayCase(policy=policy, ep_size=size, redundancy=redundancy)
        for policy in ("static", "device_limited", "coactivation", "eplb")
        for size in (8, 12, 64)
        for redundancy in (0.0, 0.25, 0.5)
        if size == 8 or policy != "static"
    ]
    results = [result for result in replay(trace, cases) if result.score is not None]
    figures = {(r.case.policy, r.case.ep_size, r.case.redundancy): r for r in results}
    limited = figures["device_limited", 8, 0.25]
    names = ("DeepSeek-V2-Lite, experts that fire together", "The bundled model as if it had no groups")
    everything = {ZIPF: [r for r in results if r.case.ep_size == 8] + _as_if_on(limited, (12, 64))}
    text = goals(everything | dict.fromkeys(names, results), {0.25: 1.0, 0.5: 1.0})
    assert text.count("| yes |") + text.count("| no, see below |") == 9
    assert f"| {max(r.score.ranks_per_token_max for r in results if r.case.policy == 'device_limited'):.3f} |" in text


def _as_if_on(result, sizes):
    return [
        replace(result, case=replace(result.case, ep_size=size, redundancy=redundancy))
        for size in sizes
        for redundancy in (0.0, 0.25, 0.5)
    ]


def test_kinds_with_hot_experts_of_their_own_are_balanced_better_with_rebalancing_on(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    kinds = []
    for hot in ((0, 1), (4, 6)):
        ids = random_ids(MODEL, 512, 0)
        ids[:, rng.random(512) < 0.7] = np.asarray(hot)
        kinds.append(ids)
    lines = drifted(MODEL, kinds, 2)
    assert len(lines["on"]) == len(lines["off"]) == MINUTES * STEPS_PER_MINUTE
    assert np.mean(lines["on"]) > np.mean(lines["off"])
    pytest.importorskip("matplotlib")
    draw({"tiny": lines}, tmp_path / "drift.svg")
    assert (tmp_path / "drift.svg").read_text().startswith("<?xml")
