"""The decoder: token ids to hidden states to logits. The routed experts are elsewhere, behind ExpertDispatcher.

A layer of one forward:
1. norm, attention over the latent cache (mla.py), residual;
2. norm; a dense layer runs its MLP; a mixture layer
3. chooses experts (router/gate.py, in fp32) and dispatches its rows;
4. runs the shared experts meanwhile;
5. combines: fp32 sum of routed and shared, cast once, residual.
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.attention_backend import AttentionBackend
from attention.attention_metadata import AttentionMetadata
from attention.attention_plan import AttentionPlan, MlaForm
from attention.decoder_weights import DecoderConfig, DecoderWeights, MoeWeights
from attention.expert_choice import choose_experts
from attention.kernel_mla import KernelMla, KernelMlaWeights
from attention.latent_cache import LatentCache
from attention.layers import rms_norm
from attention.mla import Mla
from attention.rotary import RotaryEmbedding
from attention.torch_backend import TorchBackend

__all__ = ["Decoder", "DecoderConfig", "DecoderWeights", "ExpertDispatcher"]


class ExpertDispatcher(Protocol):
    """Takes a layer's rows to their routed experts and brings the weighted sums back."""

    def dispatch(self, layer_id: int, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Any:
        """Starts; returns a handle at once.

        hidden_states: [num_tokens, hidden_size]; topk_weights: [num_tokens, top_k] fp32; topk_ids: [num_tokens, top_k]
        int64, ascending.
        """
        ...

    def combine(self, handle: Any) -> Tensor:
        """Waits. Returns the routed experts' weighted sums: [num_tokens, hidden_size] fp32."""
        ...


class Decoder:
    """One owner: the engine thread. Pure but for the latent cache, into which a forward writes its rows."""

    def __init__(
        self,
        config: DecoderConfig,
        weights: DecoderWeights,
        dispatcher: ExpertDispatcher,
        latent_cache: LatentCache,
        attention_backend: AttentionBackend | None = None,
        mla_form: MlaForm = MlaForm.BY_POSITION,
    ) -> None:
        self.config = config
        self._weights = weights
        self._dispatcher = dispatcher
        self._mla_form = mla_form
        self._rotary = RotaryEmbedding(config.rotary, weights.embedding.device)
        backend = TorchBackend() if attention_backend is None else attention_backend
        self._attention = [
            KernelMla(config.mla, layer.attention, config.softmax_scale, latent_cache, layer_id)
            if isinstance(layer.attention, KernelMlaWeights)
            else Mla(config.mla, layer.attention, config.softmax_scale, backend, latent_cache, layer_id)
            for layer_id, layer in enumerate(weights.layers)
        ]

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, metadata: AttentionMetadata) -> Tensor:
        """Hidden states after the final norm: [num_tokens, hidden_size]. token_ids: [num_tokens] int64."""
        plan = AttentionPlan.build(metadata, self._mla_form)
        rotation = self._rotary.at(metadata.positions)
        hidden_states = F.embedding(token_ids, self._weights.embedding)
        for layer_id, layer in enumerate(self._weights.layers):
            normed = rms_norm(hidden_states, layer.attention_norm, self.config.rms_norm_eps)
            hidden_states = self._attention[layer_id].forward(normed, rotation, plan, hidden_states)
            normed = rms_norm(hidden_states, layer.mlp_norm, self.config.rms_norm_eps)
            if isinstance(layer.mlp, MoeWeights):
                hidden_states = self._mixture(layer_id, layer.mlp, normed, hidden_states)
            else:
                hidden_states = hidden_states + layer.mlp(normed, hidden_states.dtype)
        return rms_norm(hidden_states, self._weights.norm, self.config.rms_norm_eps)

    @torch.inference_mode()
    def logits(self, hidden_states: Tensor) -> Tensor:
        """hidden_states: [n, hidden_size] as forward returns them. Returns [n, vocab_size] fp32."""
        return self._weights.lm_head(hidden_states, out_dtype=torch.float32)

    def _mixture(self, layer_id: int, moe: MoeWeights, normed: Tensor, residual: Tensor) -> Tensor:
        """Routed and shared experts of the normed rows, and the residual: summed in fp32, cast once."""
        topk_weights, topk_ids = choose_experts(normed, moe.gate, self.config.gate, moe.correction_bias)
        handle = self._dispatcher.dispatch(layer_id, normed, topk_weights, topk_ids)
        shared = None if moe.shared_experts is None else moe.shared_experts(normed, torch.float32)
        output = self._dispatcher.combine(handle)  # [num_tokens, hidden_size] fp32
        if shared is not None:
            output = output.add_(shared)
        return output.add_(residual).to(residual.dtype)
