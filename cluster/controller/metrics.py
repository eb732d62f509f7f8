"""The controller's Prometheus series: the balance of the experts' load, the shards, the rebalances.

Few series for every size of model: per layer the largest term and the median, never one per expert unless that was
asked for. The full matrix is in the call GetExpertLoad. Built when somebody scrapes, from values that do not change.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from cluster.controller.process import ClusterStatus
from cluster.controller.rebalance import RebalanceCause, RebalanceState
from router.balance_terms import BalanceTerms, Traffic, balance_terms
from router.gate_config import GateConfig

STATISTICS = {"median": 0.5, "max": 1.0}  # quantiles of a layer; each costs V2 59 layers x 3 terms


class ControllerMetrics(Collector):
    """Registers itself."""

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        gate: GateConfig,
        status: Callable[[], ClusterStatus],
        traffic: Callable[[], Traffic | None],
        num_rebalances: Callable[[], Mapping[RebalanceCause, int]],
        has_expert_series: bool,
    ) -> None:
        """status, traffic, num_rebalances: of the controller, from any thread.

        has_expert_series: one for each (layer, expert).
        """
        self._gate = gate
        self._status = status
        self._traffic = traffic
        self._num_rebalances = num_rebalances
        self._has_expert_series = has_expert_series
        registry.register(self)

    def describe(self) -> Iterable[Metric]:
        """Nothing in advance, so that registering does not collect."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """The series."""
        yield from self._rebalances()
        traffic = self._traffic()
        if traffic is not None:
            yield from self._terms(traffic)

    def _rebalances(self) -> Iterator[Metric]:
        status = self._status()
        rebalance = status.rebalance
        rebalances = CounterMetricFamily(
            "mobula_rebalances", "Rebalances since the controller started, by how they ended.", labels=["outcome"]
        )
        rebalances.add_metric(["done"], rebalance.num_done)
        rebalances.add_metric(["aborted"], rebalance.num_aborted)
        yield rebalances
        begun = CounterMetricFamily(
            "mobula_rebalances_begun", "Rebalances since the controller started, by why.", labels=["cause"]
        )
        for cause, count in self._num_rebalances().items():
            begun.add_metric([cause.value], count)
        yield begun
        yield _gauge(
            "mobula_rebalance_under_way",
            "1 while experts move.",
            float(rebalance.state is not RebalanceState.IDLE),
        )
        yield _gauge(
            "mobula_rebalance_planned_bytes", "Weights that the latest rebalance moves.", rebalance.planned_bytes
        )
        yield _gauge("mobula_rebalance_moved_bytes", "Of these, moved so far.", rebalance.moved_bytes)
        if rebalance.seconds_since_success is not None:
            yield _gauge(
                "mobula_rebalance_age_seconds",
                "Since the last rebalance that was done; missing before the first.",
                rebalance.seconds_since_success,
            )
        yield _gauge("mobula_controller_placement_version", "That workers are told.", status.placement_version)
        num_shards = sum(name.startswith("shard-") for name, _ in status.processes)
        yield _gauge("mobula_expert_shards", "Shards that there are, also those that come or leave.", num_shards)

    def _terms(self, traffic: Traffic) -> Iterator[Metric]:
        terms = balance_terms(traffic, self._gate)
        layer_ids = [str(layer_id) for layer_id in traffic.expert_map.moe_layer_ids]
        yield _gauge(
            "mobula_expert_load_total_balancedness",
            "Mean over maximum of the shards' assignments of late, all layers together; 1 is even.",
            terms.total_balancedness,
        )
        balancedness = GaugeMetricFamily(
            "mobula_expert_load_balancedness", "The same within a layer.", labels=["layer"]
        )
        for layer_id, value in zip(layer_ids, terms.balancedness.tolist(), strict=True):
            balancedness.add_metric([layer_id], value)
        yield balancedness
        if terms.replica_hit_share is not None:
            yield _gauge(
                "mobula_replica_hit_ratio",
                "Of the assignments of units with replicas, those not computed by the unit's first shard.",
                terms.replica_hit_share,
            )
        for name, documentation, values in (
            ("mobula_balance_expert_term", "f: an expert's share of its layer, 1 is even.", terms.expert_terms),
            ("mobula_balance_compute_term", "f': a shard's share of a layer's computation.", terms.compute_terms),
            (
                "mobula_balance_communication_term",
                "f'': a shard's share of tokens sent.",
                terms.communication_terms,
            ),
        ):
            family = GaugeMetricFamily(name, documentation, labels=["layer", "statistic"])
            quantiles = np.quantile(values, list(STATISTICS.values()), axis=1, method="higher")  # [statistics, layers]
            for row, layer_id in enumerate(layer_ids):
                for statistic, value in zip(STATISTICS, quantiles[:, row].tolist(), strict=True):
                    family.add_metric([layer_id, statistic], value)
            yield family
        if self._has_expert_series:
            yield _expert_series(terms, layer_ids)


def _expert_series(terms: BalanceTerms, layer_ids: list[str]) -> Metric:
    family = GaugeMetricFamily("mobula_expert_term", "f of each expert, 1 is even.", labels=["layer", "expert"])
    for layer_id, values in zip(layer_ids, terms.expert_terms.tolist(), strict=True):
        for expert_id, value in enumerate(values):
            family.add_metric([layer_id, str(expert_id)], value)
    return family


def _gauge(name: str, documentation: str, value: float) -> Metric:
    gauge = GaugeMetricFamily(name, documentation)
    gauge.add_metric([], value)
    return gauge
