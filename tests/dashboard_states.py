"""A system of DeepSeek-V2's size as the dashboard sees it: 59 layers of 160 experts, 16 shards, 8 workers, made up.

Each look at it counts more tokens, so that the page has something to draw.
"""

import time
from dataclasses import replace
from typing import Any

import numpy as np

from cluster.controller.process import ClusterStatus, ProcessHealth, ProcessState
from cluster.controller.rebalance import RebalanceState, RebalanceStatus
from cluster.dashboard.event_log import EventLog
from cluster.dashboard.state import status_fields

LAYERS, EXPERTS, SHARDS, WORKERS, GROUPS, TOP_K = 59, 160, 16, 8, 8, 6
FIRST_LAYER = 1
BOUNDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5]


class MadeUpSystem:
    """Stands where cluster.dashboard.dashboard.Dashboard does."""

    def __init__(self, seed: int = 5, tokens_per_look: int = 2400) -> None:
        rng = np.random.default_rng(seed)
        self._rng = rng
        self.tokens_per_look = tokens_per_look
        affinity = rng.gamma(1.6, size=(LAYERS, EXPERTS)) * np.repeat(rng.gamma(9.0, size=(LAYERS, GROUPS)), 20, axis=1)
        self._share = affinity / affinity.sum(axis=1, keepdims=True)
        self.unit_ep_ranks = [
            [[int(rank)] if rng.random() > 0.15 else sorted({int(rank), int(other)})]
            for rank, other in rng.integers(0, SHARDS, size=(LAYERS * GROUPS, 2))
        ]
        self.num_tokens = np.zeros((LAYERS, EXPERTS), dtype=np.int64)
        self.num_looks = 0
        self.down: str | None = None
        self.log = EventLog()
        self._tell_a_story()

    def state(self, known_placement_version: int, last_event: int) -> dict[str, Any]:
        """As the real one's."""
        self.num_looks += 1
        drift = 1 + 0.5 * np.sin(self.num_looks / 9 + np.arange(EXPERTS) / 25)
        load = self._share * drift
        load /= load.sum(axis=1, keepdims=True)
        self.num_tokens += self._rng.poisson(load * self.tokens_per_look * TOP_K)
        status = self._status(RebalanceStatus(num_done=2, last_result="version 3 is served"))
        state: dict[str, Any] = {
            "time_s": time.time(),
            "errors": {},
            "model": {
                "model_id": "DeepSeek-V2", "model_type": "deepseek_v2", "n_routed_experts": EXPERTS,
                "num_experts_per_tok": TOP_K, "n_group": GROUPS, "topk_group": 3, "dp_size": WORKERS,
                "ep_size": SHARDS, "version": "0.1.0",
            },
            "load": self._load(),
            "status": status_fields(status),
            "metrics": self._metrics(),
            "events": self.log.after(last_event),
        }  # fmt: skip
        if known_placement_version != 3:
            state["placement"] = self._placement()
        return state

    def _placement(self) -> dict[str, Any]:
        units = [expert // (EXPERTS // GROUPS) for expert in range(EXPERTS)]
        layers = [
            {
                "layer_id": FIRST_LAYER + layer,
                "expert_to_unit": units,
                "unit_ep_ranks": [ranks[0] for ranks in self.unit_ep_ranks[layer * GROUPS : (layer + 1) * GROUPS]],
            }
            for layer in range(LAYERS)
        ]
        return {"placement_version": 3, "ep_size": SHARDS, "max_ranks_per_token": 3, "layers": layers}

    def _load(self) -> dict[str, Any]:
        by_unit = self.num_tokens.reshape(LAYERS * GROUPS, -1).sum(axis=1)
        assignments = np.zeros(SHARDS)
        num_units = np.zeros(SHARDS, dtype=int)
        for count, (ranks,) in zip(by_unit, self.unit_ep_ranks, strict=True):
            assignments[ranks] += count / len(ranks)
            num_units[ranks] += 1
        total = self.num_looks * self.tokens_per_look * LAYERS
        return {
            "placement_version": 3,
            "layer_ids": list(range(FIRST_LAYER, FIRST_LAYER + LAYERS)),
            "num_tokens": self.num_tokens.tolist(),
            "shards": [
                {
                    "ep_rank": rank, "address": address_of(rank), "num_units": int(num_units[rank]),
                    "num_forwards": self.num_looks * 500, "num_rows": int(assignments[rank] * 0.42),
                    "num_assignments": int(assignments[rank]), "weight_bytes": int(num_units[rank]) * 943_718_400,
                }
                for rank in range(SHARDS)
            ],
            "dispatch": {
                "num_tokens_by_ranks": [0, int(total * 0.04), int(total * 0.27), int(total * 0.69)],
                "max_ranks_per_token": 3, "sent_bytes": total * 10240, "received_bytes": total * 20480,
                "num_dropped_assignments": 0,
            },
        }  # fmt: skip

    def _metrics(self) -> dict[str, Any]:
        rng, looks = self._rng, self.num_looks
        first = (np.cumsum([0, 0, 2, 14, 34, 18, 6, 1, 0]) * looks).tolist()
        between = (np.cumsum([0, 300, 1400, 260, 40, 4, 1, 0, 0]) * looks).tolist()
        return {
            "workers": {
                str(rank): {
                    "num_running": int(rng.integers(38, 58)), "num_waiting": int(rng.integers(0, 4)),
                    "cache_usage_ratio": 0.42 + 0.03 * rank + 0.02 * float(rng.random()),
                }
                for rank in range(WORKERS)
            },
            "counters": {
                "prompt_tokens": looks * 5200, "generation_tokens": int(looks * 2100 + 180 * np.sin(looks / 4)),
                "requests_done": looks * 11, "requests_failed": 2, "retries": 4, "device_limit_violations": 0,
                "preemptions": 3,
            },
            "histograms": {
                "time_to_first_token": {"bounds": BOUNDS, "counts": first},
                "inter_token_latency": {"bounds": BOUNDS, "counts": between},
                "dispatch_latency": {"bounds": BOUNDS, "counts": between},
                "expert_queue": {"bounds": BOUNDS, "counts": between},
            },
        }  # fmt: skip

    def _status(self, rebalance: RebalanceStatus, version: int = 3) -> ClusterStatus:
        names = [f"shard-{rank}" for rank in range(SHARDS)] + [f"worker-{rank}" for rank in range(WORKERS)]
        health = {}
        for number, name in enumerate([*names, "gateway-0"]):
            state = ProcessState.DOWN if name == self.down else ProcessState.READY
            detail = "does not answer" if name == self.down else ""
            health[name] = ProcessHealth(
                generation=name,
                state=state,
                detail=detail,
                pid=number + 100,
                address=f"10.40.{number // 8}.{10 + number}:50100",
            )
        return ClusterStatus(
            processes=tuple(health.items()),
            is_serving=self.down is None,
            placement_version=version,
            rebalance=rebalance,
        )

    def _tell_a_story(self) -> None:
        """A rebalance that was given up, one that was done, and a shard that was lost meanwhile."""
        now = time.time()
        planned_bytes = 31 * 943_718_400
        staging = RebalanceStatus(state=RebalanceState.STAGING, target_version=3, planned_bytes=planned_bytes)
        lost = "version 3 was given up while staging: shard-5 was lost"
        done = "version 3 is served: 31 units moved"
        self.log.observe(self._status(RebalanceStatus(), 2), now - 5400)
        self.log.observe(self._status(staging, 2), now - 4100)
        self.down = "shard-5"
        self.log.observe(self._status(RebalanceStatus(num_aborted=1, last_result=lost), 2), now - 4012)
        self.down = None
        self.log.observe(self._status(RebalanceStatus(num_aborted=1), 2), now - 3960)
        self.log.observe(self._status(replace(staging, num_aborted=1), 2), now - 3500)
        self.log.observe(self._status(RebalanceStatus(num_aborted=1, num_done=1, last_result=done), 3), now - 3020)


def address_of(number: int) -> str:
    """Of the process of that number."""
    return f"10.40.{number // 8}.{10 + number}:50100"
