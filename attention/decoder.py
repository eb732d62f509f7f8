"""The decoder: token ids to hidden states to logits. The routed experts are elsewhere, behind ExpertDispatcher.

A layer of one forward, for each micro-batch in turn (micro_batch.py):
1. norm, attention over the latent cache (mla.py), residual;
2. norm; a dense layer runs its MLP; a mixture layer
3. chooses experts (router/gate.py, in fp32; router/overload_valve.py, if any) and dispatches its rows;
4. runs the shared experts meanwhile, and the other micro-batches;
5. before its next layer combines: fp32 sum of routed, shared and residual, cast once.

Of the last layer every row leaves its latents; only rows whose logits are wanted attend and go on to its MLP.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.attention_backend import AttentionBackend
from attention.attention_metadata import AttentionMetadata
from attention.attention_plan import AttentionPlan
from attention.decoder_weights import DecoderConfig, DecoderWeights, MoeWeights
from attention.expert_choice import choose_experts
from attention.kernel_mla import KernelMla, KernelMlaWeights
from attention.latent_cache import LatentCache
from attention.layers import Mlp, rms_norm
from attention.micro_batch import MicroBatch, MicroBatchCount, within
from attention.mla import Mla
from attention.mla_form import MlaForm
from attention.rotary import RotaryEmbedding, Rotation
from attention.torch_backend import TorchBackend
from router.overload_valve import OverloadValve
from router.plan import NO_EXPERT

__all__ = ["Decoder", "DecoderConfig", "DecoderWeights", "ExpertDispatcher"]


class ExpertDispatcher(Protocol):
    """Takes a layer's rows to their routed experts and brings the weighted sums back."""

    def dispatch(self, layer_id: int, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Any:
        """Starts; returns a handle at once.

        hidden_states: [num_tokens, hidden_size]; topk_weights: [num_tokens, top_k] fp32; topk_ids: [num_tokens, top_k]
        int64, ascending but for NO_EXPERT, which asks for nothing.
        """
        ...

    def combine(self, handle: Any) -> Tensor:
        """Waits. Returns the routed experts' weighted sums: [num_tokens, hidden_size] fp32, the caller's to change."""
        ...

    def abandon(self, handle: Any) -> None:
        """Gives up what was dispatched and not combined."""
        ...


class AttentionBlock(Protocol):
    """One layer's attention with its norms."""

    def forward(self, hidden_states: Tensor, rotation: Rotation, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
        """Writes the rows' latents to the cache, then attends.

        hidden_states: [num_tokens, hidden_size]. Returns those that the plan wants with what attention adds, and normed
        for the MLP.
        """
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
        num_micro_batches: int | None = None,
        valve: OverloadValve | None = None,
        begin_step: Callable[[], bool] = lambda: False,
    ) -> None:
        """num_micro_batches: of each step; unset: as measured. valve: unset where every assignment is computed.

        begin_step: called as each forward begins; whether the last layer too must choose experts for every row.
        """
        self.config = config
        self._weights = weights
        self._dispatcher = dispatcher
        self._mla_form = mla_form
        self._micro_batch_count = MicroBatchCount(num_micro_batches)
        self._valve = valve
        self._begin_step = begin_step
        self._num_dropped: Tensor | None = None
        self._dtype = weights.embedding.dtype
        self._rotary = RotaryEmbedding(config.rotary, weights.embedding.device)
        backend = TorchBackend() if attention_backend is None else attention_backend
        self._attention: list[AttentionBlock] = [
            KernelMla(config.mla, layer.attention, layer.norms, config.softmax_scale, latent_cache, layer_id)
            if isinstance(layer.attention, KernelMlaWeights)
            else Mla(config.mla, layer.attention, layer.norms, config.softmax_scale, backend, latent_cache, layer_id)
            for layer_id, layer in enumerate(weights.layers)
        ]

    @property
    def num_dropped(self) -> Tensor | None:
        """Assignments of each row of the newest forward that the valve left out: [num_tokens] int64; None without one.

        Of all layers together.
        """
        return self._num_dropped

    @torch.inference_mode()
    def forward(
        self,
        token_ids: Tensor,
        metadata: AttentionMetadata,
        output_rows: list[int] | None = None,
        on_begun: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Hidden states after the final norm: [len(output_rows), hidden_size].

        token_ids: [num_tokens] int64. output_rows: those wanted of the step's rows, ascending; unset: all. on_begun:
        called as the layers begin.
        """
        count = self._micro_batch_count.choose(metadata.num_tokens, metadata.num_seqs)
        started_s = self._micro_batch_count.now_s()
        last_rows = None if self._begin_step() else output_rows
        micro_batches = [
            self._micro_batch(token_ids[rows], part, within(rows, last_rows)) for rows, part in metadata.split(count)
        ]
        on_begun()
        try:
            for layer_id in range(self.config.num_hidden_layers):
                for micro_batch in micro_batches:
                    self._layer(layer_id, micro_batch)
            outputs = [self._output(micro_batch) for micro_batch in micro_batches]
        except Exception:
            for micro_batch in micro_batches:
                if micro_batch.routed is not None:
                    self._dispatcher.abandon(micro_batch.routed)
            raise
        seconds = self._micro_batch_count.now_s() - started_s
        self._micro_batch_count.record(metadata.num_tokens, metadata.num_seqs, count, seconds)
        if self._valve is not None:
            self._num_dropped = torch.cat([micro_batch.num_dropped for micro_batch in micro_batches])
        output = outputs[0] if count == 1 else torch.cat(outputs)
        return output if last_rows is output_rows else output[output_rows]

    @torch.inference_mode()
    def logits(self, hidden_states: Tensor) -> Tensor:
        """hidden_states: [n, hidden_size] as forward returns them. Returns [n, vocab_size] fp32."""
        return self._weights.lm_head(hidden_states, out_dtype=torch.float32)

    def _micro_batch(
        self, token_ids: Tensor, metadata: AttentionMetadata, last_rows: Sequence[int] | None
    ) -> MicroBatch:
        """last_rows: those that the last layer computes; None for all."""
        plan = AttentionPlan.build(metadata, self._mla_form)
        return MicroBatch(
            plan=plan,
            last_plan=plan if last_rows is None or len(last_rows) == len(token_ids) else plan.narrowed(last_rows),
            rotation=self._rotary.at(metadata.positions),
            hidden_states=F.embedding(token_ids, self._weights.embedding),
            num_dropped=torch.zeros_like(token_ids),
        )

    def _layer(self, layer_id: int, rows: MicroBatch) -> None:
        """From the layer before, whose routed experts may still be away, to this one's dispatch."""
        plan = rows.last_plan if layer_id == self.config.num_hidden_layers - 1 else rows.plan
        hidden_states, normed = self._attention[layer_id].forward(self._combined(rows), rows.rotation, plan)
        rows.hidden_states = hidden_states
        if len(normed):
            self._mlp(layer_id, self._weights.layers[layer_id].mlp, rows, normed)

    def _mlp(self, layer_id: int, mlp: Mlp | MoeWeights, rows: MicroBatch, normed: Tensor) -> None:
        """A dense layer's whole, or a mixture layer's up to where its routed experts are awaited."""
        hidden_states = rows.hidden_states
        if not isinstance(mlp, MoeWeights):
            rows.hidden_states = hidden_states + mlp(normed, hidden_states.dtype)
            return
        topk_weights, topk_ids = choose_experts(normed, mlp.gate, self.config.gate, mlp.correction_bias, self._valve)
        if self._valve is not None:
            rows.count_dropped((topk_ids == NO_EXPERT).sum(dim=-1))
        rows.routed = self._dispatcher.dispatch(layer_id, normed, topk_weights, topk_ids)
        if mlp.shared_experts is None:
            rows.hidden_states = hidden_states.float()
        else:
            rows.hidden_states = mlp.shared_experts(normed, torch.float32, residual=hidden_states)

    def _combined(self, rows: MicroBatch) -> Tensor:
        """The hidden states with what the routed experts add: summed in fp32, cast once."""
        if rows.routed is None:
            return rows.hidden_states
        routed, rows.routed = rows.routed, None
        return self._dispatcher.combine(routed).add_(rows.hidden_states).to(self._dtype)

    def _output(self, rows: MicroBatch) -> Tensor:
        return rms_norm(self._combined(rows), self._weights.norm, self.config.rms_norm_eps)
