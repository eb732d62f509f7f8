"""Small models and traces made by hand."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from router.gate_config import GateConfig, TopkMethod
from router.trace.model_shape import ModelShape
from router.trace.trace import ExpertIds, TraceHeader, TraceWindow, id_dtype


def tiny_model(
    *, experts: int = 8, top_k: int = 2, layers: int = 2, groups: int = 4, top_groups: int = 2, is_limited: bool = True
) -> ModelShape:
    return ModelShape(
        name="tiny",
        moe_layer_ids=tuple(range(1, layers + 1)),
        gate=GateConfig(
            n_routed_experts=experts,
            num_experts_per_tok=top_k,
            n_group=groups if is_limited else 1,
            topk_group=top_groups if is_limited else 1,
            topk_method=TopkMethod.GROUP_LIMITED_GREEDY if is_limited else TopkMethod.GREEDY,
        ),
        hidden_size=16,
        moe_intermediate_size=4,
    )


def random_ids(model: ModelShape, num_tokens: int, seed: int) -> ExpertIds:
    """Any experts, whatever the gate's groups: [num_moe_layers, num_tokens, top_k]."""
    keys = np.random.default_rng(seed).random((model.num_moe_layers, num_tokens, model.gate.n_routed_experts))
    ids = np.sort(np.argsort(keys, axis=-1)[..., : model.top_k], axis=-1)
    return ids.astype(id_dtype(model.gate.n_routed_experts))


@dataclass
class ListTrace:
    """A trace in memory."""

    header: TraceHeader
    content: Sequence[TraceWindow]

    @property
    def num_tokens(self) -> int:
        return sum(window.num_tokens for window in self.content)

    def windows(self) -> Iterator[TraceWindow]:
        return iter(self.content)


def trace_of(model: ModelShape, *ids: ExpertIds) -> ListTrace:
    return ListTrace(TraceHeader(model=model, source="by hand"), [TraceWindow(topk_ids=each) for each in ids])
