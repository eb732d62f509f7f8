"""The overload valve: leaves out assignments beyond a capacity, between the gate and the dispatch of a layer.

Off unless the configuration asks for it, and then there is no valve at all. Knows nothing of where experts live: a
"device" is an expert group, as DeepSeek-V2 has one on each device, so no placement changes what is left out. What does
is the batch: a token's experts then depend on the tokens beside it, and so on how a step is cut into micro-batches.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from router import capacity
from router.gate import expert_scores
from router.gate_config import GateConfig
from router.plan import NO_EXPERT
from router.router_config import CapacityPolicy, RouterConfig


class OverloadValve:
    """Immutable. `count_dropped` is told each layer's assignments that were left out."""

    def __init__(self, config: RouterConfig, gate: GateConfig, count_dropped: Callable[[int], None]) -> None:
        assert config.capacity_policy is not CapacityPolicy.DROPLESS, "nothing to do; leave the valve out"
        self._policy = config.capacity_policy
        self._factor = config.capacity_factor
        self._minimum = config.min_capacity
        self._gate = gate
        self._count_dropped = count_dropped
        self._expert_to_group = torch.arange(gate.n_routed_experts) // gate.experts_per_group

    @classmethod
    def wanted(
        cls, config: RouterConfig, gate: GateConfig, count_dropped: Callable[[int], None]
    ) -> "OverloadValve | None":
        """None where every assignment is computed."""
        return None if config.capacity_policy is CapacityPolicy.DROPLESS else cls(config, gate, count_dropped)

    def limit(self, topk_ids: Tensor, logits: Tensor) -> Tensor:
        """The same experts with NO_EXPERT for what is left out: [num_tokens, top_k] int64.

        topk_ids: [num_tokens, top_k] int64; logits: [num_tokens, n_routed_experts], which they were chosen by.
        """
        num_tokens, top_k = topk_ids.shape
        is_by_device = self._policy is CapacityPolicy.DEVICE_DROP
        num_takers = self._gate.n_group if is_by_device else self._gate.n_routed_experts
        limit = capacity.capacity_of(topk_ids.numel(), num_takers, self._factor, self._minimum)
        most = num_tokens * (min(top_k, self._gate.experts_per_group) if is_by_device else 1)
        if most <= limit:  # nobody can be asked for more
            return topk_ids
        kept = self._kept(topk_ids, logits, limit)
        num_dropped = topk_ids.numel() - int(kept.sum())
        if not num_dropped:
            return topk_ids
        self._count_dropped(num_dropped)
        return topk_ids.masked_fill(~kept, NO_EXPERT)

    def _kept(self, topk_ids: Tensor, logits: Tensor, limit: int) -> Tensor:
        if self._policy is CapacityPolicy.SWITCH:
            return capacity.switch(topk_ids, capacity=limit)
        affinities = expert_scores(logits, self._gate.scoring_func).gather(-1, topk_ids)
        if self._policy is CapacityPolicy.GSHARD:
            return capacity.gshard(topk_ids, affinities, capacity=limit)
        expert_to_group = self._expert_to_group.to(topk_ids.device)
        return capacity.device_drop(topk_ids, affinities, expert_to_device=expert_to_group, capacity=limit)
