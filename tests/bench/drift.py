"""Balancedness over time while prompts switch kind every minute, with rebalancing on and off; a picture of it.

Replays recorded choices through the controller's own load tracker, policy and hysteresis, without a cluster.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from cluster.controller.rebalance import Hysteresis, plan_rebalance
from router.expert_map import ExpertMap
from router.load import LoadConfig, LoadTracker
from router.placement import PlacementRequest, place_units
from router.trace.model_shape import ModelShape
from router.trace.replica_choice import router_choice
from router.trace.score import balancedness
from router.trace.trace import ExpertIds, Trace

Line = dict[str, list[float]]
MINUTES, STEPS_PER_MINUTE, STEP_TOKENS = 12, 12, 256
STEP_S = 60.0 / STEPS_PER_MINUTE
REDUNDANCY = 0.25
HALF_LIFE_S, MIN_INTERVAL_S, MIN_GAIN = 10.0, 10.0, 0.03
WINDOW_STEPS = 2  # that a point of the picture covers


def drifted(model: ModelShape, kinds: Sequence[ExpertIds], num_shards: int) -> Line:
    """Balancedness over all layers, step after step: with rebalancing "on" and "off".

    kinds: [num_moe_layers, num_tokens, top_k] of each kind of prompt.
    """
    steps = _steps(kinds)
    return {name: _run(model, steps, num_shards, is_on=name == "on") for name in ("off", "on")}


def kinds_of(trace: Trace) -> tuple[ModelShape, list[ExpertIds]]:
    """The tokens of each kind of prompt of a recording."""
    by_kind: dict[str, list[ExpertIds]] = defaultdict(list)
    for window in trace.windows():
        by_kind[window.label].append(window.topk_ids)
    return trace.header.model, [np.concatenate(parts, axis=1) for parts in by_kind.values()]


def draw(panels: dict[str, Line], path: Path) -> None:
    """Writes an SVG or PNG, by the name's ending. panels: by title."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "drift"  # the same picture gives the same file
    figure = Figure(figsize=(9, 2.8 * len(panels)), layout="constrained")
    for axis, (title, lines) in zip(figure.subplots(len(panels), squeeze=False).ravel(), panels.items(), strict=True):
        for name, colour in (("off", "tab:red"), ("on", "tab:blue")):
            values = lines[name]
            minutes = [step / STEPS_PER_MINUTE for step in range(len(values))]
            axis.plot(minutes, values, color=colour, label=f"rebalancing {name}: mean {np.mean(values):.3f}")
        for minute in range(1, MINUTES):
            axis.axvline(minute, color="grey", linewidth=0.4)
        axis.set_title(title, fontsize="medium")
        axis.set_xlabel("minutes; the kind of prompt changes at each line")
        axis.set_ylabel("balancedness, all layers")
        axis.set_ylim(None, 1.0)
        axis.legend(loc="lower right", fontsize="small")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _run(model: ModelShape, steps: Sequence[ExpertIds], num_shards: int, *, is_on: bool) -> list[float]:
    request = PlacementRequest(
        moe_layer_ids=model.moe_layer_ids, gate=model.gate, ep_size=num_shards, redundancy=REDUNDANCY
    )
    expert_map = place_units(request, policy="device_limited")
    tracker = LoadTracker(
        len(model.moe_layer_ids), model.gate.n_routed_experts, LoadConfig(half_life_s=HALF_LIFE_S, window_s=HALF_LIFE_S)
    )
    next_map: ExpertMap | None = None
    decided_s = -MIN_INTERVAL_S
    counts: list[np.ndarray] = []
    shown = []
    for step, topk_ids in enumerate(steps):
        now_s = step * STEP_S
        if next_map is not None:  # a step after it was decided
            expert_map, next_map = next_map, None
        loads, counted = _computed(expert_map, topk_ids, step)
        counts = [*counts, loads][-WINDOW_STEPS:]
        shown.append(float(balancedness(np.sum(counts, axis=0, dtype=np.float64))))
        tracker.add(counted, now_s)
        if not is_on or now_s - decided_s < MIN_INTERVAL_S:
            continue
        decided_s = now_s
        load = tracker.estimate(expert_map.placement_version, now_s).decayed
        new = _placed(request, load, expert_map)
        if plan_rebalance(expert_map, new, load, 1, Hysteresis(MIN_GAIN, 0)).is_worth_it:
            next_map = new
    return shown


def _placed(request: PlacementRequest, load: np.ndarray, current: ExpertMap) -> ExpertMap:
    return place_units(replace(request, load=load, current=current), current.placement_version + 1, "device_limited")


def _computed(expert_map: ExpertMap, topk_ids: ExpertIds, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Assignments by shard over all layers, [ep_size], and by (layer, expert)."""
    num_layers, num_experts = expert_map.expert_to_unit.shape
    layers = np.arange(num_layers)[:, None, None]
    ids = topk_ids.astype(np.int64)
    ep_ranks = router_choice(expert_map, expert_map.expert_to_unit[layers, ids], step)
    counted = np.bincount((layers * num_experts + ids).ravel(), minlength=num_layers * num_experts)
    return np.bincount(ep_ranks.ravel(), minlength=expert_map.ep_size), counted.reshape(num_layers, num_experts)


def _steps(kinds: Sequence[ExpertIds]) -> list[ExpertIds]:
    """One kind of prompt for a minute, then the next one; a kind's tokens are used again when they end."""
    begun = [0] * len(kinds)
    chosen = []
    for minute in range(MINUTES):
        kind = minute % len(kinds)
        for _ in range(STEPS_PER_MINUTE):
            tokens = np.arange(begun[kind], begun[kind] + STEP_TOKENS) % kinds[kind].shape[1]
            begun[kind] += STEP_TOKENS
            chosen.append(kinds[kind][:, tokens])
    return chosen
