"""Placement: seconds that a policy takes at the published models' sizes on one core, and how well it balances."""

import itertools
import time
import timeit
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from router.completions import ForwardCall
from router.expert_map import ExpertMap
from router.gate_config import GateConfig, TopkMethod
from router.placement import POLICIES, PlacementRequest, moved_bytes, place_units
from router.placement.scores import balancedness, hottest_in_layer
from router.plan_kernels import plan_layer
from router.routing import Candidates, Routing
from router.shard_health import ShardHealth
from router.shard_queues import ShardQueues
from router.unit_trust import UnitTrust
from tests.bench.row import Options, Param, Row

NAME = "placement"
ZIPF = 1.1  # exponent of experts' popularity
CHOICE_SHARDS, CHOICE_TOKENS, CHOICE_LIMIT_US = 16, 256, 100.0
DRIFT = 0.3  # of the load that has changed when a placement starts from the current map


@dataclass(frozen=True, slots=True)
class Case:
    """A model's size on a number of shards. limit_s: what the solver is allowed."""

    model: str
    gate: GateConfig
    num_layers: int
    ep_size: int
    limit_s: float

    @property
    def size(self) -> str:
        return f"{self.num_layers} x {self.gate.n_routed_experts} x {self.ep_size}"


V2_GATE = GateConfig(
    n_routed_experts=160, num_experts_per_tok=6, n_group=8, topk_group=3, topk_method=TopkMethod.GROUP_LIMITED_GREEDY
)
V3_GATE = GateConfig(
    n_routed_experts=256, num_experts_per_tok=8, n_group=8, topk_group=4, topk_method=TopkMethod.NOAUX_TC
)
V2, V3 = Case("v2", V2_GATE, 59, 64, 2.0), Case("v3", V3_GATE, 61, 320, 10.0)
V2_UNGROUPED = Case("v2 without groups", GateConfig(n_routed_experts=160, num_experts_per_tok=6), 59, 64, 2.0)
LITE = Case("v2-lite", GateConfig(n_routed_experts=64, num_experts_per_tok=6), 26, 8, 2.0)


def rows(options: Options) -> Iterator[Row]:
    """By model, policy and redundancy: from scratch, and from the current map after the load has changed."""
    for case in (V2,) if options.is_quick else (V2, V3):
        for policy, redundancy in (("device_limited", 0.0), ("device_limited", 0.25), ("eplb", 0.25)):
            yield from _rows(options, case, policy, redundancy)
    for case in (LITE,) if options.is_quick else (LITE, V2_UNGROUPED):
        yield from _rows(options, case, "coactivation", 0.25)
    yield from _replica_choice_rows(options)


def _rows(options: Options, case: Case, policy: str, redundancy: float) -> Iterator[Row]:
    assert policy in POLICIES
    options.check_time(2 * options.num_repeats * case.limit_s)
    options.show(f"{case.model} {policy}")
    params: dict[str, Param] = {"model": case.model, "size": case.size, "policy": policy, "redundancy": redundancy}
    rng = np.random.default_rng(0)
    request = PlacementRequest(
        moe_layer_ids=tuple(range(case.num_layers)),
        gate=case.gate,
        ep_size=case.ep_size,
        redundancy=redundancy,
        load=_zipf_load(case, rng),
        coactivation=_coactivation(case, rng) if policy == "coactivation" else None,
    )
    assert request.load is not None
    first, samples = _timed(options, request, policy)
    hottest = hottest_in_layer(first, request.load, case.gate.n_group if case.gate.n_group > 1 else 8)
    scores: dict[str, Param] = {
        "balancedness": round(balancedness(first, request.load), 4),
        "hottest p99": round(float(np.percentile(hottest, 99)), 3),
    }
    yield Row.of(NAME, params | {"from": "nothing"} | scores, samples, "s", limits=[case.limit_s] * len(samples))
    load = (1 - DRIFT) * request.load + DRIFT * _zipf_load(case, rng)
    drifted, samples = _timed(options, replace(request, load=load, current=first), policy)
    scores = {
        "balancedness": round(balancedness(drifted, load), 4),
        "moved": round(moved_bytes(first, drifted, 1) / _num_held(drifted), 3),
    }
    yield Row.of(NAME, params | {"from": "the map"} | scores, samples, "s", limits=[case.limit_s] * len(samples))


def _replica_choice_rows(options: Options) -> Iterator[Row]:
    """What choosing replicas adds to the plan of a layer: all of what the router does for it, and its compiled part."""
    rng = np.random.default_rng(0)
    load = _zipf_load(V2, rng)
    shards, transports = ShardQueues(), (_Connected(),) * CHOICE_SHARDS
    for ep_rank in range(CHOICE_SHARDS):
        shards.sent(ep_rank, 10)
        shards.answered(ep_rank, 10, queue_s=1e-4, compute_s=1e-4)
    candidates = Candidates(
        turns=itertools.count(), queues=shards, health=ShardHealth(), trust=UnitTrust(), late_after_s=0.1
    )
    groups = rng.permuted(np.tile(np.arange(8), (CHOICE_TOKENS, 1)), axis=1)[:, :3]
    experts = (groups[:, :, None] * 20 + np.arange(20)).reshape(CHOICE_TOKENS, 60)
    topk_ids = torch.from_numpy(np.sort(rng.permuted(experts, axis=1)[:, :6], axis=1))
    topk_weights = torch.full(topk_ids.shape, 1 / 6)
    for redundancy in (0.25, 1.0):
        request = PlacementRequest(
            moe_layer_ids=tuple(range(V2.num_layers)), gate=V2_GATE, ep_size=CHOICE_SHARDS, load=load,
            redundancy=redundancy,
        )  # fmt: skip
        expert_map = place_units(request, policy="device_limited")
        limit = expert_map.max_ranks_per_token(V2_GATE)
        routing = Routing(expert_map=expert_map, transports=transports, max_ranks_per_token=limit)
        units, alone = expert_map.expert_to_unit[0], np.ascontiguousarray(expert_map.unit_to_ep_ranks[0, :, :1])

        def plan_alone(units: np.ndarray = units, alone: np.ndarray = alone) -> None:
            plan_layer(topk_ids, topk_weights, units, alone, CHOICE_SHARDS, None)

        def plan_choosing(units: np.ndarray = units, routing: Routing = routing) -> None:
            usable, queues, addresses = candidates.to_plan(routing, 0)
            plan_layer(topk_ids, topk_weights, units, usable, CHOICE_SHARDS, queues, addresses)

        added = [
            1e6 * (min(timeit.repeat(plan_choosing, number=20, repeat=20)) / 20)
            - 1e6 * (min(timeit.repeat(plan_alone, number=20, repeat=20)) / 20)
            for _ in range(options.num_repeats)
        ]
        params: dict[str, Param] = {
            "what": f"replica choice of {CHOICE_TOKENS} tokens",
            "model": V2.model,
            "shards": CHOICE_SHARDS,
            "redundancy": redundancy,
        }
        yield Row.of(NAME, params, added, "us", limits=[CHOICE_LIMIT_US] * len(added))


class _Connected:
    """A transport that is only looked at."""

    address, is_connected = "", True

    def forward(self, call: ForwardCall) -> None:
        """Never called."""

    def cancel(self, call: ForwardCall) -> None:
        """Never called."""

    def close(self) -> None:
        """Never called."""


def _timed(options: Options, request: PlacementRequest, policy: str) -> tuple[ExpertMap, list[float]]:
    samples = []
    for _ in range(options.num_repeats):
        start_s = time.process_time()  # all threads' seconds: what one core would take
        expert_map = place_units(request, policy=policy)
        samples.append(time.process_time() - start_s)
    return expert_map, samples


def _zipf_load(case: Case, rng: np.random.Generator) -> np.ndarray:
    popularity = np.arange(1, case.gate.n_routed_experts + 1) ** -ZIPF
    return np.stack([rng.permutation(1e6 * popularity / popularity.sum()) for _ in range(case.num_layers)])


def _coactivation(case: Case, rng: np.random.Generator) -> np.ndarray:
    """Without structure: the hardest to cut, as much is nearly as good."""
    pairs = rng.random((case.num_layers, case.gate.n_routed_experts, case.gate.n_routed_experts))
    return pairs + pairs.transpose(0, 2, 1)


def _num_held(expert_map: ExpertMap) -> int:
    """Experts on all shards, counting replicas."""
    replicas = (expert_map.unit_to_ep_ranks >= 0).sum(axis=2)
    return int(np.take_along_axis(replicas, expert_map.expert_to_unit, axis=1).sum())
