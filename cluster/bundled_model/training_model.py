"""The differentiable model: DeepSeek-V2 (arXiv 2405.04434) in plain torch, with un-absorbed attention.

Whole sequences only, no cache, no ranks: what serves the model is elsewhere, and is checked against this. The experts
of a layer are stacked in two tensors here; `published_state_dict` gives the names and shapes of the published
checkpoints.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from router.gate import expert_scores, router_logits, select_experts
from router.gate_config import GateConfig, TopkMethod


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnConfig:
    """Rope scaling (YaRN, arXiv 2309.00071), with the field names of config.json."""

    factor: float = 32.0  # max_position_embeddings / original_max_position_embeddings
    original_max_position_embeddings: int = 256  # tokens, the length of a training sequence
    beta_fast: float = 32.0  # full rotations above which a frequency is kept as it is
    beta_slow: float = 1.0  # full rotations below which a frequency is divided by `factor`
    mscale: float = 0.707
    mscale_all_dim: float = 0.707


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The model's shape, with the field names of config.json."""

    vocab_size: int = 3072
    hidden_size: int = 256
    num_hidden_layers: int = 6
    first_k_dense_replace: int = 1  # the first layers have a dense MLP instead of experts
    intermediate_size: int = 640
    moe_intermediate_size: int = 48
    n_routed_experts: int = 32
    n_shared_experts: int = 2
    num_experts_per_tok: int = 6
    n_group: int = 8
    topk_group: int = 3
    routed_scaling_factor: float = 4.0
    num_attention_heads: int = 8
    q_lora_rank: int = 96
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 32
    v_head_dim: int = 32
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    yarn: YarnConfig = field(default_factory=YarnConfig)

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """1/sqrt(head dim), times the square of YaRN's mscale."""
        mscale = 0.1 * self.yarn.mscale_all_dim * math.log(self.yarn.factor) + 1.0
        return mscale * mscale / math.sqrt(self.qk_head_dim)

    @property
    def max_position_embeddings(self) -> int:
        return int(self.yarn.factor * self.yarn.original_max_position_embeddings)

    @property
    def gate(self) -> GateConfig:
        return GateConfig(
            n_routed_experts=self.n_routed_experts,
            num_experts_per_tok=self.num_experts_per_tok,
            n_group=self.n_group,
            topk_group=self.topk_group,
            topk_method=TopkMethod.GROUP_LIMITED_GREEDY,
            routed_scaling_factor=self.routed_scaling_factor,
        )


@dataclass(frozen=True, slots=True)
class Routing:
    """What the gate of one layer did with one batch."""

    scores: Tensor  # [num_sequences, num_tokens, n_routed_experts] fp32, softmax over all experts
    topk_ids: Tensor  # [num_sequences, num_tokens, top_k] int64


def yarn_inverse_frequencies(config: ModelConfig) -> Tensor:
    """[qk_rope_head_dim / 2] fp32: fast rotations kept, slow ones divided by `factor`, a linear ramp between."""
    dim, base, yarn = config.qk_rope_head_dim, config.rope_theta, config.yarn

    def dimension_that_rotates(num_rotations: float) -> float:
        context = yarn.original_max_position_embeddings / (num_rotations * 2 * math.pi)
        return dim * math.log(context) / (2 * math.log(base))

    low = max(math.floor(dimension_that_rotates(yarn.beta_fast)), 0)
    high = min(math.ceil(dimension_that_rotates(yarn.beta_slow)), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    frequencies = base ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    return frequencies / yarn.factor * ramp + frequencies * (1 - ramp)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of interleaved pairs. x: [..., num_tokens, dim]; cos, sin: [num_tokens, dim / 2]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class Attention(nn.Module):
    """Multi-head latent attention, un-absorbed (section 2.1)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, heads = config, config.num_attention_heads
        self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=False)
        self.q_a_layernorm = nn.RMSNorm(config.q_lora_rank, eps=config.rms_norm_eps)
        self.q_b_proj = nn.Linear(config.q_lora_rank, heads * config.qk_head_dim, bias=False)
        kv_a_dim = config.kv_lora_rank + config.qk_rope_head_dim
        self.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, kv_a_dim, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(config.kv_lora_rank, eps=config.rms_norm_eps)
        kv_b_dim = heads * (config.qk_nope_head_dim + config.v_head_dim)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, kv_b_dim, bias=False)
        self.o_proj = nn.Linear(heads * config.v_head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [num_sequences, num_tokens, hidden_size], and so is the result."""
        config, heads = self.config, self.config.num_attention_heads
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).unflatten(-1, (heads, -1)).transpose(1, 2)
        q_nope, q_pe = q.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        latent, k_pe = self.kv_a_proj_with_mqa(x).split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (heads, -1)).transpose(1, 2)
        k_nope, v = kv.split([config.qk_nope_head_dim, config.v_head_dim], dim=-1)
        k_pe = rotate(k_pe, cos, sin).unsqueeze(1).expand(-1, heads, -1, -1)  # one for all heads
        q = torch.cat((q_nope, rotate(q_pe, cos, sin)), dim=-1)  # [num_sequences, heads, num_tokens, qk_head_dim]
        k = torch.cat((k_nope, k_pe), dim=-1)
        v = F.pad(v, (0, config.qk_head_dim - config.v_head_dim))  # torch's fused CPU kernel wants one head dim
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=config.softmax_scale)
        projected: Tensor = self.o_proj(out[..., : config.v_head_dim].transpose(1, 2).flatten(-2))
        return projected


class MLP(nn.Module):
    """SwiGLU; the shared experts are one of these."""

    def __init__(self, hidden_size: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, inner, bias=False)
        self.up_proj = nn.Linear(hidden_size, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class MoE(nn.Module):
    """Routed experts and the fused shared ones (section 2.2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        num_experts, inner = config.n_routed_experts, config.moe_intermediate_size
        self.gate = nn.Linear(config.hidden_size, num_experts, bias=False)
        self.experts_gate_up = nn.Parameter(torch.empty(num_experts, 2, inner, config.hidden_size))
        self.experts_down = nn.Parameter(torch.empty(num_experts, config.hidden_size, inner))
        self.shared_experts = MLP(config.hidden_size, inner * config.n_shared_experts)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """x: [num_sequences, num_tokens, hidden_size], and so is the first result. No token is dropped."""
        tokens, top_k = x.flatten(0, 1), self.config.num_experts_per_tok
        logits = router_logits(tokens, self.gate.weight)
        topk_weights, topk_ids = select_experts(logits, self.config.gate)
        order = topk_ids.flatten().argsort(stable=True)  # [num_tokens * top_k], assignments by expert
        counts = topk_ids.flatten().bincount(minlength=self.config.n_routed_experts)
        offsets = counts.cumsum(0).to(torch.int32)  # where each expert's rows end
        rows = tokens.index_select(0, order // top_k)
        gate_up = self.experts_gate_up.flatten(1, 2).transpose(1, 2)  # [n_routed_experts, hidden_size, 2 * inner]
        gate, up = F.grouped_mm(rows, gate_up, offs=offsets).chunk(2, dim=-1)
        answers = F.grouped_mm(F.silu(gate) * up, self.experts_down.transpose(1, 2), offs=offsets)
        answers = answers * topk_weights.flatten().index_select(0, order).unsqueeze(-1)
        routed = torch.zeros_like(tokens).index_add(0, order // top_k, answers)
        scores = expert_scores(logits, self.config.gate.scoring_func)
        routing = Routing(scores.unflatten(0, x.shape[:2]), topk_ids.unflatten(0, x.shape[:2]))
        return routed.view_as(x) + self.shared_experts(x), routing


class Layer(nn.Module):
    """Attention and then a dense MLP or an MoE, each behind a norm and beside a residual."""

    def __init__(self, config: ModelConfig, layer_id: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        is_dense = layer_id < config.first_k_dense_replace
        self.mlp = MLP(config.hidden_size, config.intermediate_size) if is_dense else MoE(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Routing | None]:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoE):
            out, routing = self.mlp(normed)
            return x + out, routing
        return x + self.mlp(normed), None


class Decoder(nn.Module):
    """What the published names put under `model.`: token ids to normed hidden states."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, layer_id) for layer_id in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, token_ids: Tensor) -> tuple[Tensor, list[Routing]]:
        positions = torch.arange(token_ids.shape[1], dtype=torch.float32)
        angles = torch.outer(positions, yarn_inverse_frequencies(self.config))
        cos, sin = angles.cos(), angles.sin()  # [num_tokens, qk_rope_head_dim / 2]
        x = self.embed_tokens(token_ids)
        routings = []
        for layer in self.layers:
            x, routing = layer(x, cos, sin)
            if routing is not None:
                routings.append(routing)
        return self.norm(x), routings


class TrainingModel(nn.Module):
    """Token ids to logits, and the routing of each MoE layer for the balance losses."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        """Normal weights of std 1/sqrt(inputs); what writes to the residual stream starts smaller, by depth."""
        residual = (2 * self.config.num_hidden_layers) ** -0.5
        for name, weight in self.named_parameters():
            if weight.dim() == 1:
                continue
            std = 0.5 if "embed_tokens" in name else weight.shape[-1] ** -0.5
            if "gate.weight" in name or "lm_head" in name:
                std *= 0.3
            nn.init.normal_(weight, std=std * (residual if "o_proj" in name or "down" in name else 1.0))

    def forward(self, token_ids: Tensor) -> tuple[Tensor, list[Routing]]:
        """token_ids: [num_sequences, num_tokens] int64. Returns logits [..., vocab_size], Routing by MoE layer."""
        hidden_states, routings = self.model(token_ids)
        return self.lm_head(hidden_states), routings

    def published_state_dict(self) -> dict[str, Tensor]:
        """Contiguous tensors under the names of the published checkpoints, three matrices an expert."""
        published = {}
        for name, weight in self.state_dict().items():
            prefix, _, last = name.rpartition(".")
            if last == "experts_gate_up":
                for expert_id, (gate, up) in enumerate(weight):
                    published[f"{prefix}.experts.{expert_id}.gate_proj.weight"] = gate.contiguous()
                    published[f"{prefix}.experts.{expert_id}.up_proj.weight"] = up.contiguous()
            elif last == "experts_down":
                for expert_id, down in enumerate(weight):
                    published[f"{prefix}.experts.{expert_id}.down_proj.weight"] = down.contiguous()
            else:
                published[name] = weight.contiguous()
        return published

    def load_published_state_dict(self, published: dict[str, Tensor]) -> None:
        """The inverse of `published_state_dict`; raises KeyError for a missing tensor."""
        state = {}
        for name in self.state_dict():
            prefix, _, last = name.rpartition(".")
            experts = [f"{prefix}.experts.{expert_id}" for expert_id in range(self.config.n_routed_experts)]
            if last == "experts_gate_up":
                pairs = [(published[f"{e}.gate_proj.weight"], published[f"{e}.up_proj.weight"]) for e in experts]
                state[name] = torch.stack([torch.stack(pair) for pair in pairs])
            elif last == "experts_down":
                state[name] = torch.stack([published[f"{e}.down_proj.weight"] for e in experts])
            else:
                state[name] = published[name]
        self.load_state_dict(state)
