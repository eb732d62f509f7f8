"""Stand-ins for the parts a test is not about."""

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.decoder import DecoderConfig
from attention.layers import WeightReader, linear


class LocalExperts:
    """An ExpertDispatcher without shards: every routed expert lies here and answers at once."""

    def __init__(self, reader: WeightReader, config: DecoderConfig, dtype: torch.dtype = torch.float32) -> None:
        self._experts = {
            (layer_id, expert_id): [
                reader.read(name).to(dtype) for name in config.expert_weight_shapes(layer_id, expert_id)
            ]
            for layer_id in config.moe_layer_ids
            for expert_id in range(config.gate.n_routed_experts)
        }

    def dispatch(self, layer_id: int, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """The handle is the answer: each row's weighted sum, fp32, experts added in ascending order."""
        output = torch.zeros(hidden_states.shape, dtype=torch.float32)
        for expert_id in topk_ids.unique().tolist():
            rows, places = (topk_ids == expert_id).nonzero(as_tuple=True)
            gate, up, down = self._experts[layer_id, expert_id]
            x = hidden_states[rows]
            answer = linear(F.silu(linear(x, gate)) * linear(x, up), down)
            output[rows] += answer.float() * topk_weights[rows, places].unsqueeze(-1)
        return output

    def combine(self, handle: Tensor) -> Tensor:
        return handle
