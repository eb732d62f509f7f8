"""Stand-ins for the parts a test is not about."""

import torch
from torch import Tensor

from attention.decoder import DecoderConfig
from experts.grouped_ffn import ForwardInput, grouped_ffn
from experts.weight_store import ExpertModel, Unit, WeightReader, WeightStore
from tests.fake_experts import wire_assignments


class LocalExperts:
    """An ExpertDispatcher without shards: every routed expert lies here, in one unit, and answers at once.

    num_rows: of each dispatch so far, with its layer.
    """

    def __init__(self, reader: WeightReader, config: DecoderConfig, dtype: torch.dtype = torch.float32) -> None:
        self._store = WeightStore(
            ExpertModel(
                moe_layer_ids=config.moe_layer_ids,
                n_routed_experts=config.gate.n_routed_experts,
                hidden_size=config.hidden_size,
                moe_intermediate_size=config.moe_intermediate_size,
                dtype=dtype,
            ),
            reader,
        )
        self.num_rows: list[tuple[int, int]] = []
        all_experts = tuple(range(config.gate.n_routed_experts))
        self._store.activate(1, [Unit(layer_id, 0, all_experts) for layer_id in config.moe_layer_ids])

    def dispatch(self, layer_id: int, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """The handle is the answer: each row's weighted sum, fp32, experts added in ascending order."""
        self.num_rows.append((layer_id, len(hidden_states)))
        layer = self._store.layer(1, layer_id)
        assert layer is not None
        rows = torch.arange(len(hidden_states)).repeat_interleave(topk_ids.shape[1])
        forward = ForwardInput(
            hidden_states=hidden_states.contiguous(),
            assignment_bytes=wire_assignments(topk_weights.flatten(), rows, topk_ids.flatten(), rows),
            num_partial_sums=len(hidden_states),
        )
        return grouped_ffn(forward, layer.experts).float()

    def combine(self, handle: Tensor) -> Tensor:
        return handle

    def abandon(self, handle: Tensor) -> None:
        """There is nothing on its way."""
