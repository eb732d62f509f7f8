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
    num_layers = model.num_moe_layers
    together = np.zeros((num_layers, num_experts, num_experts), dtype=np.int64)
    num_counted = 0
    for window in trace.windows():
        topk_ids = window.topk_ids[:, : num_tokens - num_counted]
        together += _pairs(topk_ids, num_experts)
        num_counted += topk_ids.shape[1]
        on_progress(num_counted / num_tokens)
        if num_counted == num_tokens:
            break
    load = np.diagonal(together, axis1=1, axis2=2).astype(np.float64)
    coactivation = (together + together.swapaxes(1, 2)).astype(np.float64)
    np.einsum("lee->le", coactivation)[...] = 0.0
    return Traffic(load=load, coactivation=coactivation)


def _pairs(topk_ids: ExpertIds, num_experts: int) -> npt.NDArray[np.int64]:
    """Tokens that chose both, [num_moe_layers, num_experts, num_experts], above the diagonal; those that chose the one
    on it. topk_ids: [num_moe_layers, num_tokens, top_k], ascending in a row."""
    num_layers, _, top_k = topk_ids.shape
    first, second = np.triu_indices(top_k)
    ids = topk_ids.astype(np.int64)
    pairs = ids[..., first] * num_experts + ids[..., second]  # [num_moe_layers, num_tokens, top_k * (top_k + 1) / 2]
    pairs += np.arange(num_layers)[:, None, None] * num_experts**2
    counts = np.bincount(pairs.ravel(), minlength=num_layers * num_experts**2)
    return counts.reshape(num_layers, num_experts, num_experts)
