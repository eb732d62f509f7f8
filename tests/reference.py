"""The oracle: the whole model in fp32, straight from the papers, as slow and plain as it likes.

Attention is un-absorbed and keeps every head's keys and values; every expert is applied on its own to the tokens that
chose it. Shares nothing with the system but the reading of config.json. DeepSeek-V2 (arXiv 2405.04434) sections 2.1
and 2.2, DeepSeek-V3 (arXiv 2412.19437) section 2.1; YaRN (arXiv 2309.00071).
"""

import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from cluster.checkpoint.checkpoint import Checkpoint

QUERY_TOKENS = 512  # queries whose scores are in memory at once


class Reference:
    """One checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        self.config = Checkpoint.open(folder).model_config()
        self._weights: dict[str, Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            self._weights |= {name: tensor.float() for name, tensor in load_file(path).items()}

    def logits(self, token_ids: list[int]) -> Tensor:
        """[num_tokens, vocab_size] fp32."""
        return self._forward(token_ids, [None] * self.config.decoder.num_hidden_layers)

    def generate(self, prompt: list[int], num_tokens: int) -> list[int]:
        """The greedy continuation; ties go to the lower id, and end tokens are tokens like any other."""
        context: list[tuple[Tensor, Tensor] | None] = [None] * self.config.decoder.num_hidden_layers
        generated: list[int] = []
        last = list(prompt)
        for _ in range(num_tokens):
            logits = self._forward(last, context)[-1]
            generated.append(int((logits == logits.max()).nonzero()[0]))
            last = generated[-1:]
        return generated

    def _forward(self, token_ids: list[int], context: list[tuple[Tensor, Tensor] | None]) -> Tensor:
        """context: keys and values of each layer so far; extended in place."""
        decoder = self.config.decoder
        first = context[0]
        start = 0 if first is None else first[0].shape[0]
        positions = torch.arange(start, start + len(token_ids))
        hidden = self._weights["model.embed_tokens.weight"][torch.tensor(token_ids)]
        for layer in range(decoder.num_hidden_layers):
            prefix = f"model.layers.{layer}"
            normed = self._norm(hidden, f"{prefix}.input_layernorm", decoder.rms_norm_eps)
            attended, context[layer] = self._attention(normed, f"{prefix}.self_attn", positions, context[layer])
            hidden = hidden + attended
            normed = self._norm(hidden, f"{prefix}.post_attention_layernorm", decoder.rms_norm_eps)
            if layer >= decoder.first_k_dense_replace and layer % decoder.moe_layer_freq == 0:
                hidden = hidden + self._mixture(normed, f"{prefix}.mlp")
            else:
                hidden = hidden + self._mlp(normed, f"{prefix}.mlp")
        hidden = self._norm(hidden, "model.norm", decoder.rms_norm_eps)
        head = "lm_head" if "lm_head.weight" in self._weights else "model.embed_tokens"
        return hidden @ self._weights[f"{head}.weight"].T

    def _norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps) * self._weights[f"{name}.weight"]

    def _mlp(self, x: Tensor, prefix: str) -> Tensor:
        gate = x @ self._weights[f"{prefix}.gate_proj.weight"].T
        up = x @ self._weights[f"{prefix}.up_proj.weight"].T
        return (gate * torch.sigmoid(gate) * up) @ self._weights[f"{prefix}.down_proj.weight"].T

    def _attention(
        self, x: Tensor, prefix: str, positions: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        mla = self.config.decoder.mla
        if mla.q_lora_rank is None:
            query = x @ self._weights[f"{prefix}.q_proj.weight"].T
        else:
            compressed = self._norm(x @ self._weights[f"{prefix}.q_a_proj.weight"].T, f"{prefix}.q_a_layernorm", 1e-6)
            query = compressed @ self._weights[f"{prefix}.q_b_proj.weight"].T
        query = query.view(len(x), mla.num_attention_heads, mla.qk_nope_head_dim + mla.qk_rope_head_dim)
        latent = x @ self._weights[f"{prefix}.kv_a_proj_with_mqa.weight"].T
        compressed = self._norm(latent[:, : mla.kv_lora_rank], f"{prefix}.kv_a_layernorm", 1e-6)
        key_value = (compressed @ self._weights[f"{prefix}.kv_b_proj.weight"].T).view(
            len(x), mla.num_attention_heads, -1
        )
        shared_key = self._rotate(latent[:, None, mla.kv_lora_rank :], positions)
        shared_key = shared_key.expand(-1, mla.num_attention_heads, -1)
        key = torch.cat([key_value[..., : mla.qk_nope_head_dim], shared_key], dim=-1)
        value = key_value[..., mla.qk_nope_head_dim :]
        if past is not None:
            key, value = torch.cat([past[0], key]), torch.cat([past[1], value])
        query = torch.cat(
            [query[..., : mla.qk_nope_head_dim], self._rotate(query[..., mla.qk_nope_head_dim :], positions)], dim=-1
        )
        pieces = [
            self._attend(query[i : i + QUERY_TOKENS], key, value, positions[i : i + QUERY_TOKENS])
            for i in range(0, len(x), QUERY_TOKENS)
        ]
        return torch.cat(pieces).flatten(1) @ self._weights[f"{prefix}.o_proj.weight"].T, (key, value)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> Tensor:
        """query: [n, heads, dim] at these positions; key and value: all positions from 0 on."""
        scores = torch.einsum("qhd,khd->hqk", query, key) * self._softmax_scale()
        scores = scores.masked_fill(torch.arange(len(key)) > positions[:, None], float("-inf"))
        return torch.einsum("hqk,khd->qhd", torch.softmax(scores, dim=-1), value)

    def _softmax_scale(self) -> float:
        mla, yarn = self.config.decoder.mla, self.config.decoder.rotary.yarn
        scale = 1.0 / math.sqrt(mla.qk_nope_head_dim + mla.qk_rope_head_dim)
        if yarn is None or not yarn.mscale_all_dim or yarn.factor <= 1:
            return scale
        return scale * (0.1 * yarn.mscale_all_dim * math.log(yarn.factor) + 1.0) ** 2

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Neighbouring numbers are a complex number, turned by the position's angle. x: [n, heads, rope]."""
        rotary = self.config.decoder.rotary
        dim, yarn, magnitude = rotary.head_dim, rotary.yarn, 1.0
        frequencies = torch.tensor(
            [rotary.theta ** (-2.0 * pair / dim) for pair in range(dim // 2)], dtype=torch.float32
        )
        if yarn is not None:
            turns = [
                dim
                * math.log(yarn.original_max_position_embeddings / (beta * 2 * math.pi))
                / (2 * math.log(rotary.theta))
                for beta in (yarn.beta_fast, yarn.beta_slow)
            ]
            low, high = max(math.floor(turns[0]), 0), min(math.ceil(turns[1]), dim - 1)
            for pair in range(dim // 2):
                stretched = min(max((pair - low) / max(high - low, 0.001), 0.0), 1.0)
                frequencies[pair] *= stretched / yarn.factor + (1.0 - stretched)
            if yarn.factor > 1:
                log = 0.1 * math.log(yarn.factor)
                magnitude = (log * yarn.mscale + 1.0) / (log * yarn.mscale_all_dim + 1.0)
        angles = positions[:, None, None].float() * frequencies  # [n, 1, rope / 2]
        turned = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * torch.polar(torch.ones(()), angles)
        return torch.view_as_real(turned).flatten(-2) * magnitude

    def _mixture(self, x: Tensor, prefix: str) -> Tensor:
        gate = self.config.decoder.gate
        weights, experts = self._choose(x @ self._weights[f"{prefix}.gate.weight"].T, prefix)
        output = (
            self._mlp(x, f"{prefix}.shared_experts") if self.config.decoder.n_shared_experts else torch.zeros_like(x)
        )
        for expert in range(gate.n_routed_experts):
            tokens, places = (experts == expert).nonzero(as_tuple=True)
            answer = self._mlp(x[tokens], f"{prefix}.experts.{expert}")
            output[tokens] += answer * weights[tokens, places].unsqueeze(-1)
        return output

    def _choose(self, affinity: Tensor, prefix: str) -> tuple[Tensor, Tensor]:
        """Weights and ids of each token's experts, by the published rules of each generation."""
        gate = self.config.decoder.gate
        if self.config.model_type == "deepseek_v3":
            scores = torch.sigmoid(affinity)
            choice = scores + self._weights[f"{prefix}.gate.e_score_correction_bias"]
            group_scores = choice.view(len(choice), gate.n_group, -1).topk(2).values.sum(dim=-1)
        else:
            scores = choice = torch.softmax(affinity, dim=-1)
            group_scores = choice.view(len(choice), gate.n_group, -1).max(dim=-1).values
        if gate.topk_method != "greedy":
            is_kept = torch.zeros_like(group_scores, dtype=torch.bool)
            is_kept.scatter_(1, group_scores.topk(gate.topk_group).indices, True)
            per_group = gate.n_routed_experts // gate.n_group
            choice = choice.masked_fill(~is_kept.repeat_interleave(per_group, dim=1), float("-inf"))
        experts = choice.topk(gate.num_experts_per_tok).indices
        weights = scores.gather(1, experts)
        if gate.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights * gate.routed_scaling_factor, experts
