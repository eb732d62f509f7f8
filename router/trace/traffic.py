"""What a policy is told about traffic: how much each expert is used, and which experts are used together."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from router.trace.trace import ExpertIds, Trace

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Traffic:
    """load: [num_moe_layers, n_routed_experts] float64, assignments.

    coactivation: [num_moe_layers, n_routed_experts, n_routed_experts] float64, tokens that chose both; 0 diagonal.
    """

    load: Float64Array
    coactivation: Float64Array


def count_traffic(
    trace: Trace, num_tokens: int, on_progress: Callable[[float], None] = lambda fraction: None
) -> Traffic:
    """Of the first `num_tokens` tokens."""
    model = trace.header.model
    num_experts = model.gate.n_routed_experts
    together = np.zeros((model.num_moe_layers, num_experts, num_experts))
    num_counted = 0
    for window in trace.windows():
        topk_ids = window.topk_ids[:, : num_tokens - num_counted]
        for layer, ids in enumerate(topk_ids):
            together[layer] += _pairs(ids, num_experts)
        num_counted += topk_ids.shape[1]
        on_progress(num_counted / num_tokens)
        if num_counted == num_tokens:
            break
    load = np.diagonal(together, axis1=1, axis2=2).copy()
    np.einsum("lee->le", together)[...] = 0.0
    return Traffic(load=load, coactivation=together)


def _pairs(topk_ids: ExpertIds, num_experts: int) -> npt.NDArray[np.float32]:
    """[num_experts, num_experts]: tokens that chose both; the diagonal has those that chose the one. Exact to 2**24."""
    is_chosen = np.zeros((len(topk_ids), num_experts), dtype=np.float32)
    np.put_along_axis(is_chosen, topk_ids.astype(np.int64), 1.0, axis=-1)
    pairs: npt.NDArray[np.float32] = is_chosen.T @ is_chosen
    return pairs
