"""Capacity policies: which assignments are served when an expert or a device may take only so many. Pure tensors.

    dropless      all
    switch        tokens in order: Switch Transformer (arXiv 2101.03961) section 2.2
    gshard        all tokens' first choices in order, then all second ones, and so on: GShard (arXiv 2006.16668) alg. 1
    device_drop   highest affinity first, on each device: DeepSeek-V2 (arXiv 2405.04434) section 2.2.4

Each returns the mask of assignments that are kept; the weight of one that is not is left out of its token's sum, and
the others' are not raised. Under every policy but `dropless` a token's experts depend on the tokens beside it.

topk_ids: [num_tokens, top_k] int64, no duplicates within a row. affinities: [num_tokens, top_k], the gate's scores of
these experts (gate.expert_scores, before normalisation). asked: [num_tokens, top_k] bool, assignments that want a place
at all (gate.asks_second_choice); all if unset. Returned: [num_tokens, top_k] bool, never more than `asked`.
"""

import math

import torch
from torch import Tensor


def capacity_of(num_assignments: int, num_takers: int, factor: float, minimum: int = 1) -> int:
    """Assignments that one of `num_takers` experts or devices takes: `factor` times an even share, rounded up.

    With factor 1 there is a place for every assignment, if only the load were even.
    """
    even_share = num_assignments / num_takers
    return max(minimum, math.ceil(round(factor * even_share, 9)))  # 0.1 * 30 is 3, not a little more


def dropless(topk_ids: Tensor, *, asked: Tensor | None = None) -> Tensor:
    """Everything that was asked for."""
    return torch.ones_like(topk_ids, dtype=torch.bool) if asked is None else asked


def switch(topk_ids: Tensor, *, capacity: int, asked: Tensor | None = None) -> Tensor:
    """The first `capacity` assignments of each expert, in the tokens' order."""
    in_order = torch.arange(topk_ids.numel(), device=topk_ids.device)
    return _admitted(in_order, topk_ids, capacity, asked)


def gshard(topk_ids: Tensor, affinities: Tensor, *, capacity: int, asked: Tensor | None = None) -> Tensor:
    """The first `capacity` assignments of each expert: all first choices in the tokens' order before any second one.

    A token's choices are in falling order of affinity, ties to the lower column.
    """
    num_tokens, top_k = topk_ids.shape
    choices = affinities.sort(dim=-1, descending=True, stable=True).indices  # [num_tokens, top_k], columns
    starts = torch.arange(num_tokens, device=topk_ids.device) * top_k
    return _admitted((starts + choices.T).flatten(), topk_ids, capacity, asked)


def device_drop(
    topk_ids: Tensor, affinities: Tensor, *, expert_to_device: Tensor, capacity: int, asked: Tensor | None = None
) -> Tensor:
    """The `capacity` assignments of highest affinity on each device; ties to the earlier token, then the lower column.

    expert_to_device: [n_routed_experts] int64.
    """
    by_affinity = affinities.flatten().sort(descending=True, stable=True).indices
    return _admitted(by_affinity, expert_to_device[topk_ids], capacity, asked)


def _admitted(arrivals: Tensor, takers: Tensor, capacity: int, asked: Tensor | None) -> Tensor:
    """The first `capacity` that arrive at each taker.

    arrivals: [num_tokens * top_k] int64, the flat index of every assignment in order of precedence; takers:
    [num_tokens, top_k] int64, whom each assignment wants.
    """
    if asked is not None:
        arrivals = arrivals[asked.flatten()[arrivals]]
    queues = takers.flatten()[arrivals]
    by_queue = queues.argsort(stable=True)
    lengths = queues.bincount()
    starts = (lengths.cumsum(0) - lengths)[queues[by_queue]]
    places = torch.arange(len(queues), device=takers.device) - starts  # in their queues, of by_queue
    kept = torch.zeros(takers.numel(), dtype=torch.bool, device=takers.device)
    kept[arrivals[by_queue]] = places < capacity
    return kept.view_as(takers)
