"""Replays a trace under several placements at once: each is computed from the first part and scored on the rest.

1. One pass over the first `training_share` of the tokens adds up the load and which experts fire together.
2. Each case's policy places the units: on empty shards, or with few moves from the static placement of those shards.
3. One pass over the remaining tokens, cut into steps, scores every placement.

Holds one window and a few arrays for each case, whatever the length of the trace.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from router.expert_map import ExpertMap, Int64Array
from router.placement import POLICIES, PlacementError, PlacementRequest, moved_bytes, place_units
from router.trace.cost_model import CostModel
from router.trace.model_shape import ModelShape
from router.trace.replica_choice import hashed_choice, router_choice
from router.trace.score import Score, Scorer
from router.trace.trace import ExpertIds, Trace, TraceError
from router.trace.traffic import Traffic, count_traffic

OnProgress = Callable[[str, float], None]
HASHED_POLICIES = frozenset({"eplb"})  # published for engines that spread replicas without looking at the token
MAX_STEP_TOKENS = 2**16
MAX_SHARDS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayCase:
    """One placement to try."""

    policy: str
    ep_size: int
    redundancy: float = 0.0  # extra unit slots over all shards, as a share of the units
    num_replicas: int = 1  # the least number of shards that hold each unit

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise TraceError(f"policy is {self.policy!r}, known are {', '.join(POLICIES)}")
        if not 1 <= self.ep_size <= MAX_SHARDS:
            raise TraceError(f"shards is {self.ep_size}, must be 1 to {MAX_SHARDS}")
        if not 0 <= self.redundancy <= self.ep_size - 1:
            raise TraceError(
                f"redundancy is {self.redundancy}, must be 0 to {self.ep_size - 1} on {self.ep_size} shards: a shard "
                "holds a unit once"
            )

    def __str__(self) -> str:
        return f"{self.policy} on {self.ep_size} shards with redundancy {self.redundancy:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaySettings:
    """What all cases have in common."""

    step_tokens: int = 256  # of one dispatch of one worker
    training_share: float = 0.5  # of the tokens, from the first on
    cost_model: CostModel = field(default_factory=CostModel)
    is_rebalance: bool = False  # place with few moves from the static placement, not as for shards that are empty

    def __post_init__(self) -> None:
        if not 1 <= self.step_tokens <= MAX_STEP_TOKENS:
            raise TraceError(f"step_tokens is {self.step_tokens}, must be 1 to {MAX_STEP_TOKENS}")
        if not 0 < self.training_share < 1:
            raise TraceError(f"training_share is {self.training_share}, must be between 0 and 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayResult:
    """A case and what came of it: an error why the policy has no placement, or the rest.

    weight_bytes: of the shard that holds most; total_weight_bytes: of all shards. moved_bytes: what shards must fetch
    when they hold the static placement, or everything where there is none.
    """

    case: ReplayCase
    error: str = ""
    score: Score | None = None
    weight_bytes: int = 0
    total_weight_bytes: int = 0
    moved_bytes: int = 0


def replay(
    trace: Trace,
    cases: Sequence[ReplayCase],
    settings: ReplaySettings | None = None,
    on_progress: OnProgress = lambda stage, fraction: None,
) -> list[ReplayResult]:
    """One result a case, in order. on_progress is told the stage and how much of it is done. Raises TraceError."""
    settings = ReplaySettings() if settings is None else settings
    num_training = int(trace.num_tokens * settings.training_share)
    if not 1 <= num_training < trace.num_tokens:
        raise TraceError(f"the trace has {trace.num_tokens} tokens, at least 2 are needed: record a longer one")
    traffic = count_traffic(trace, num_training, lambda fraction: on_progress("counting", fraction))
    placed = []
    for number, case in enumerate(cases):
        on_progress(f"placing {case}", number / len(cases))
        placed.append(_place(case, trace.header.model, traffic, settings))
    num_scored = trace.num_tokens - num_training
    for step, topk_ids in enumerate(steps(trace, num_training, settings.step_tokens)):
        for _, scorer in placed:
            if scorer is not None:
                scorer.add(topk_ids, step)
        on_progress("scoring", min(1.0, (step + 1) * settings.step_tokens / num_scored))
    return [result if scorer is None else replace(result, score=scorer.score()) for result, scorer in placed]


def steps(trace: Trace, first_token: int, step_tokens: int) -> Iterator[ExpertIds]:
    """The tokens from `first_token` on in steps: [num_moe_layers, step_tokens, top_k], across windows.

    What is left at the end is no step, unless there is no other.
    """
    waiting: list[ExpertIds] = []
    num_waiting, num_steps = 0, 0
    for topk_ids in _from_token(trace, first_token):
        waiting.append(topk_ids)
        num_waiting += topk_ids.shape[1]
        if num_waiting < step_tokens:
            continue
        ready = np.concatenate(waiting, axis=1)
        for start in range(0, num_waiting - step_tokens + 1, step_tokens):
            yield ready[:, start : start + step_tokens]
            num_steps += 1
        num_waiting %= step_tokens
        waiting = [ready[:, ready.shape[1] - num_waiting :]]
    if num_waiting and not num_steps:
        yield np.concatenate(waiting, axis=1)


def _from_token(trace: Trace, first_token: int) -> Iterator[ExpertIds]:
    start = 0
    for window in trace.windows():
        if start + window.num_tokens > first_token:
            yield window.topk_ids[:, max(0, first_token - start) :]
        start += window.num_tokens


def _place(
    case: ReplayCase, model: ModelShape, traffic: Traffic, settings: ReplaySettings
) -> tuple[ReplayResult, Scorer | None]:
    """The placement's costs, and a scorer for it unless the policy has none."""
    try:
        start = PlacementRequest(
            moe_layer_ids=model.moe_layer_ids,
            gate=model.gate,
            ep_size=case.ep_size,
            num_replicas=case.num_replicas,
            expert_bytes=model.expert_bytes,
        )
        current = _static_placement(start)
        request = replace(
            start,
            redundancy=case.redundancy,
            load=traffic.load,
            coactivation=traffic.coactivation,
            current=current if settings.is_rebalance else None,
        )
        expert_map = place_units(request, placement_version=2, policy=case.policy)
    except PlacementError as error:
        return ReplayResult(case=case, error=str(error)), None
    choice = hashed_choice if case.policy in HASHED_POLICIES else router_choice
    held = num_held_experts(expert_map)
    result = ReplayResult(
        case=case,
        weight_bytes=int(held.max()) * model.expert_bytes,
        total_weight_bytes=int(held.sum()) * model.expert_bytes,
        moved_bytes=int(held.sum()) * model.expert_bytes
        if current is None
        else moved_bytes(current, expert_map, model.expert_bytes),
    )
    return result, Scorer(model, expert_map, choice, settings.cost_model)


def _static_placement(request: PlacementRequest) -> ExpertMap | None:
    """What a cluster starts with; None where it has none, as on more shards than there are units."""
    try:
        return place_units(request)
    except PlacementError:
        return None


def num_held_experts(expert_map: ExpertMap) -> Int64Array:
    """Of each shard, counting replicas: [ep_size]."""
    num_layers, num_units, _ = expert_map.unit_to_ep_ranks.shape
    sizes = np.zeros((num_layers, num_units), dtype=np.int64)
    np.add.at(sizes, (np.arange(num_layers)[:, None], expert_map.expert_to_unit), 1)
    is_placed = expert_map.unit_to_ep_ranks >= 0
    weights = np.broadcast_to(sizes[:, :, None], is_placed.shape)[is_placed]
    held = np.bincount(expert_map.unit_to_ep_ranks[is_placed], weights=weights, minlength=expert_map.ep_size)
    return held.astype(np.int64)
