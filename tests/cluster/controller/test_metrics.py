"""The controller's series: the paper's terms against sums written out, and how many series there are."""

from dataclasses import replace

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from cluster.controller.metrics import ControllerMetrics
from cluster.controller.rebalance import RebalanceCause, RebalanceStatus
from cluster.controller.shard_traffic import ShardTraffic
from experts.metrics import ShardMetrics
from router.balance_terms import Traffic, balance_terms
from router.expert_map import ExpertMap
from router.gate_config import GateConfig
from router.metrics import RouterMetrics
from router.placement import place_units
from tests.cluster.fake_processes import counted
from tests.fake_controller import serving_status
from tests.fake_experts import MOE_LAYER_IDS, grouped_gate, placed
from tests.router.placement.requests import v2_request

GATE = grouped_gate()


def drawn(expert_map: ExpertMap, gate: GateConfig, num_tokens: int) -> tuple[Traffic, np.ndarray]:
    """Tokens whose experts are drawn, each computed by a replica that is drawn; [layers, tokens, top_k] ids."""
    rng = np.random.default_rng(0)
    num_layers, num_experts = expert_map.expert_to_unit.shape
    assignments = {rank: np.zeros((num_layers, num_experts)) for rank in expert_map.ep_ranks}
    rows = {rank: np.zeros(num_layers) for rank in expert_map.ep_ranks}
    ids = np.zeros((num_layers, num_tokens, gate.num_experts_per_tok), dtype=np.int64)
    for layer, token in np.ndindex(num_layers, num_tokens):
        groups = rng.permutation(gate.n_group)[: gate.topk_group]
        allowed = np.concatenate(np.split(np.arange(num_experts), gate.n_group))[
            np.isin(np.arange(num_experts) // (num_experts // gate.n_group), groups)
        ]
        ids[layer, token] = rng.permutation(allowed)[: gate.num_experts_per_tok]
        visited = set()
        for expert in ids[layer, token]:
            ranks = expert_map.unit_to_ep_ranks[layer, expert_map.expert_to_unit[layer, expert]]
            rank = int(rng.choice(ranks[ranks >= 0]))
            assignments[rank][layer, expert] += 1
            visited.add(rank)
        for rank in visited:
            rows[rank][layer] += 1
    return Traffic(expert_map=expert_map, num_tokens=assignments, num_rows=rows), ids


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_the_terms_are_those_of_the_paper(num_replicas: int) -> None:
    expert_map = placed(GATE, 4, num_replicas=num_replicas)
    traffic, ids = drawn(expert_map, GATE, num_tokens=50)
    terms = balance_terms(traffic, GATE)
    num_layers, num_tokens, top_k = ids.shape
    for layer in range(num_layers):
        f = [16 / (top_k * num_tokens) * sum(expert in token for token in ids[layer]) for expert in range(16)]
        assert terms.expert_terms[layer].tolist() == pytest.approx(f)  # equation 24
        for shard in range(4):
            sent = traffic.num_rows[shard][layer]
            assert terms.communication_terms[layer, shard] == pytest.approx(4 / (3 * num_tokens) * sent)  # equation 30
            if num_replicas == 1:
                held = [e for e in range(16) if shard in expert_map.unit_to_ep_ranks[layer, e // 2]]
                assert terms.compute_terms[layer, shard] == pytest.approx(np.mean([f[e] for e in held]))  # equation 27
    assert terms.expert_terms.mean(axis=1) == pytest.approx(np.ones(num_layers))
    assert terms.compute_terms.max(axis=1) == pytest.approx(1 / terms.balancedness)
    if num_replicas == 1:
        assert terms.replica_hit_share is None
    else:
        assert 0.3 < terms.replica_hit_share < 0.7


def test_without_traffic_nothing_is_divided_by_nothing() -> None:
    terms = balance_terms(Traffic(expert_map=placed(GATE, 3), num_tokens={}, num_rows={}), GATE)
    assert terms.total_balancedness == 1.0
    assert terms.balancedness.tolist() == [1.0] * len(MOE_LAYER_IDS)
    assert not terms.expert_terms.any()


def page(traffic: Traffic | None, gate: GateConfig, *, has_expert_series: bool = False) -> list[str]:
    """The series."""
    registry = CollectorRegistry()
    status = serving_status(3, replace(RebalanceStatus(num_done=2, num_aborted=1), seconds_since_success=12.5))
    ControllerMetrics(
        registry,
        gate=gate,
        status=lambda: status,
        traffic=lambda: traffic,
        num_rebalances=lambda: dict.fromkeys(RebalanceCause, 0) | {RebalanceCause.LOST: 3},
        has_expert_series=has_expert_series,
    )
    lines = generate_latest(registry).decode().splitlines()
    return [line for line in lines if not line.startswith("#")]


def test_rebalances_are_counted_and_the_last_success_is_told() -> None:
    series = page(None, GATE)
    assert 'mobula_rebalances_total{outcome="done"} 2.0' in series
    assert 'mobula_rebalances_total{outcome="aborted"} 1.0' in series
    assert 'mobula_rebalances_begun_total{cause="lost"} 3.0' in series
    assert 'mobula_rebalances_begun_total{cause="by_hand"} 0.0' in series
    assert "mobula_rebalance_age_seconds 12.5" in series
    assert "mobula_expert_shards 2.0" in series


def test_there_are_at_most_three_thousand_series_for_v2_on_sixteen_shards() -> None:
    request = v2_request(16, redundancy=0.25)
    expert_map = place_units(request, policy="device_limited")
    load = np.ones((59, 160))
    traffic = Traffic(
        expert_map=expert_map,
        num_tokens=dict.fromkeys(range(16), load),
        num_rows=dict.fromkeys(range(16), load.sum(axis=1)),
    )
    own = page(traffic, request.gate)
    registry = CollectorRegistry()
    for ep_rank in range(16):
        ShardMetrics(registry, ep_rank)
    worker = RouterMetrics(registry, 0)
    for ep_rank in range(16):
        worker.count_sent(ep_rank, 1, 1, "grpc")
        worker.count_received(ep_rank, 1, "grpc")
        worker.count_times(ep_rank, 1.0, 0.1, 0.1)
        worker.count_late(ep_rank)
    others = [line for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")]
    assert len(own) < 1_000
    assert len(own) + len(others) <= 3_000
    assert len(page(traffic, request.gate, has_expert_series=True)) == len(own) + 59 * 160


def test_a_slow_shard_is_known_by_its_work_not_by_its_load() -> None:
    traffic = ShardTraffic(half_life_s=1e9)
    zeros = np.zeros((3, 16), dtype=np.uint64)
    for rank in range(4):
        traffic.observe(rank, f"shard-{rank} a", counted(zeros), 0.0)
    for rank, (num_tokens, seconds) in enumerate(((1000, 10), (2000, 20), (500, 5.5), (500, 20))):
        counts = zeros.copy()
        counts[0, 0] = num_tokens
        traffic.observe(rank, f"shard-{rank} a", counted(counts, int(seconds * 1e9)), 1.0)
    assert traffic.speeds() == {0: 1.0, 1: 1.0, 2: 1.0, 3: 0.25}
    traffic.observe(3, "shard-3 b", counted(zeros), 2.0)  # another process
    assert 3 not in traffic.speeds()
    traffic.keep({0, 1})
    assert set(traffic.speeds()) == {0, 1}


def test_traffic_of_late_counts_half_after_a_half_life() -> None:
    traffic = ShardTraffic(half_life_s=10.0)
    counts = np.zeros((3, 16), dtype=np.uint64)
    traffic.observe(0, "a", counted(counts.copy()), 0.0)
    counts[1, 5] = 8
    traffic.observe(0, "a", counted(counts.copy()), 1.0)
    traffic.observe(0, "a", counted(counts.copy()), 11.0)
    now = traffic.traffic(placed(GATE, 2))
    assert now.num_tokens[0][1, 5] == now.num_rows[0][1] == 4.0
