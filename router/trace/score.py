"""What a placement does with a stretch of traffic, counted step by step: load by shard, shards visited, bytes, time."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from router.expert_map import ExpertMap
from router.trace.cost_model import CostModel
from router.trace.model_shape import ModelShape
from router.trace.replica_choice import ReplicaChoice
from router.trace.trace import ExpertIds

ASSIGNMENT_BYTES = 16  # on the wire: weight, row, expert, partial sum; see router/plan.py


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Figures of the traffic that was scored.

    balancedness_total: mean over max of the shards' load over all layers, 1.0 is even. Load is (row, expert) pairs.
    balancedness_layer_p01: the same within a layer, 1st percentile over the layers (shards without units count).
    hottest_mean, hottest_p99: the hottest shard within a layer as a multiple of the layer's load / n_group, mean and
        99th percentile over the layers. Without expert groups, of the layer's load / ep_size.
    ranks_per_token_mean, ranks_per_token_max: shards that a token visits in a layer.
    bytes_per_token: of payload, both ways, over all layers.
    step_time_s: mean of CostModel.step_s.
    balancedness_by_step: of balancedness_total in each step alone, in order.
    """

    balancedness_total: float
    balancedness_layer_p01: float
    hottest_mean: float
    hottest_p99: float
    ranks_per_token_mean: float
    ranks_per_token_max: int
    bytes_per_token: float
    step_time_s: float
    balancedness_by_step: tuple[float, ...]


class Scorer:
    """Adds up steps; holds nothing of them but a few numbers each."""

    def __init__(
        self,
        model: ModelShape,
        expert_map: ExpertMap,
        replica_choice: ReplicaChoice,
        cost_model: CostModel,
        speeds: npt.NDArray[np.float64] | None = None,
    ) -> None:
        """speeds: [ep_size], relative; load is divided by it."""
        self._model = model
        self._expert_map = expert_map
        self._choose = replica_choice
        self._cost_model = cost_model
        self._speeds = speeds
        self._assignments = np.zeros((model.num_moe_layers, expert_map.ep_size), dtype=np.int64)
        self._num_tokens = 0
        self._num_visits = 0
        self._max_visits = 0
        self._num_bytes = 0
        self._step_times: list[float] = []
        self._balancedness: list[float] = []

    def add(self, topk_ids: ExpertIds, step: int) -> None:
        """One dispatch of a worker in every layer. topk_ids: [num_moe_layers, num_tokens, top_k]; step: its number."""
        num_layers, num_tokens, top_k = topk_ids.shape
        layers = np.arange(num_layers)[:, None, None]
        units = self._expert_map.expert_to_unit[layers, topk_ids.astype(np.int64)]
        ep_ranks = self._choose(self._expert_map, units, step)
        ep_size = self._expert_map.ep_size
        assignments = np.bincount((layers * ep_size + ep_ranks).ravel(), minlength=num_layers * ep_size)
        assignments = assignments.reshape(num_layers, ep_size)

        tokens = np.arange(num_tokens)[None, :, None]
        is_sent = np.zeros((num_layers, num_tokens, ep_size), dtype=np.bool_)
        is_sent[layers, tokens, ep_ranks] = True
        visits = is_sent.sum(axis=-1)  # [num_moe_layers, num_tokens]
        is_summed = np.zeros((num_layers, num_tokens, self._expert_map.num_units), dtype=np.bool_)
        is_summed[layers, tokens, units] = True
        num_rows = visits.sum(axis=-1) + is_summed.sum(axis=(1, 2))  # [num_moe_layers], sent and received
        num_bytes = num_rows * self._model.row_bytes + num_tokens * top_k * ASSIGNMENT_BYTES
        num_messages = is_sent.any(axis=1).sum(axis=-1)  # [num_moe_layers]

        self._assignments += assignments
        self._num_tokens += num_tokens
        self._num_visits += int(visits.sum())
        self._max_visits = max(self._max_visits, int(visits.max(initial=0)))
        self._num_bytes += int(num_bytes.sum())
        self._step_times.append(
            self._cost_model.step_s(self._model, assignments, num_messages, num_bytes, self._speeds)
        )
        self._balancedness.append(float(balancedness(self._load(assignments).sum(axis=0))))

    def score(self) -> Score:
        """Of all steps so far, at least one."""
        load = self._load(self._assignments)
        gate = self._model.gate
        num_parts = gate.n_group if gate.is_group_limited else self._expert_map.ep_size
        hottest = load.max(axis=1) / (load.sum(axis=1) / num_parts)  # every token chooses in every layer: never 0 / 0
        return Score(
            balancedness_total=float(balancedness(load.sum(axis=0))),
            balancedness_layer_p01=float(np.percentile(balancedness(load), 1)),
            hottest_mean=float(hottest.mean()),
            hottest_p99=float(np.percentile(hottest, 99)),
            ranks_per_token_mean=self._num_visits / (self._num_tokens * self._model.num_moe_layers),
            ranks_per_token_max=self._max_visits,
            bytes_per_token=self._num_bytes / self._num_tokens,
            step_time_s=float(np.mean(self._step_times)),
            balancedness_by_step=tuple(self._balancedness),
        )

    def _load(self, assignments: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        return assignments / (np.ones(self._expert_map.ep_size) if self._speeds is None else self._speeds)


def balancedness(load: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Mean over max of the last axis; 1.0 is even, and so is nothing at all."""
    most = load.max(axis=-1)
    result: npt.NDArray[np.float64] = np.divide(load.mean(axis=-1), most, out=np.ones_like(most), where=most > 0)
    return result
