"""What a decoder is made of: its configuration and its weights, read by their published Hugging Face names.

The routed experts' weights are not here: attention workers do not hold them.
"""

from dataclasses import dataclass, fields, is_dataclass

import torch
from torch import Tensor

from attention.kernel_mla import KernelMlaWeights, can_use_kernels
from attention.layers import BlockNorms, Mlp, Projection, TorchProjection, WeightReader, WeightTarget
from attention.mla import MlaWeights
from attention.mla_config import MlaConfig
from attention.rotary import RotaryConfig
from router.gate_config import GateConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """The decoder as the checkpoint defines it."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    first_k_dense_replace: int  # layers before this one are dense
    moe_layer_freq: int  # from there on, layers whose number this divides are mixtures
    intermediate_size: int  # of the dense layers
    moe_intermediate_size: int  # of one expert
    n_shared_experts: int  # fused in one MLP n_shared_experts * moe_intermediate_size wide; 0: none
    rms_norm_eps: float
    max_position_embeddings: int  # tokens
    tie_word_embeddings: bool
    mla: MlaConfig
    rotary: RotaryConfig
    gate: GateConfig
    has_correction_bias: bool  # V3: mlp.gate.e_score_correction_bias steers the selection

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "moe_layer_freq",
            "intermediate_size",
            "moe_intermediate_size",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be 1 or more")
        for name in ("first_k_dense_replace", "n_shared_experts"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, must be 0 or more")
        if not 0.0 < self.rms_norm_eps < 1.0:
            raise ValueError(f"rms_norm_eps is {self.rms_norm_eps}, must be between 0 and 1")

    @property
    def moe_layer_ids(self) -> tuple[int, ...]:
        return tuple(
            layer_id
            for layer_id in range(self.first_k_dense_replace, self.num_hidden_layers)
            if layer_id % self.moe_layer_freq == 0
        )

    @property
    def softmax_scale(self) -> float:
        return float(self.mla.qk_head_dim**-0.5) * self.rotary.softmax_scale_factor

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor a decoder reads, by its name in the checkpoint."""
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, self.hidden_size),
            "model.norm.weight": (self.hidden_size,),
        }
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        for layer_id in range(self.num_hidden_layers):
            prefix = f"model.layers.{layer_id}"
            shapes[f"{prefix}.input_layernorm.weight"] = (self.hidden_size,)
            shapes[f"{prefix}.post_attention_layernorm.weight"] = (self.hidden_size,)
            shapes |= _attention_shapes(f"{prefix}.self_attn", self.mla)
            if layer_id in self.moe_layer_ids:
                shapes |= self._moe_shapes(f"{prefix}.mlp")
            else:
                shapes |= _mlp_shapes(f"{prefix}.mlp", self.hidden_size, self.intermediate_size)
        return shapes

    def expert_weight_shapes(self, layer_id: int, expert_id: int) -> dict[str, tuple[int, ...]]:
        """The three tensors of one routed expert, by their names in the checkpoint."""
        prefix = f"model.layers.{layer_id}.mlp.experts.{expert_id}"
        return _mlp_shapes(prefix, self.hidden_size, self.moe_intermediate_size)

    def _moe_shapes(self, prefix: str) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {f"{prefix}.gate.weight": (self.gate.n_routed_experts, self.hidden_size)}
        if self.has_correction_bias:
            shapes[f"{prefix}.gate.e_score_correction_bias"] = (self.gate.n_routed_experts,)
        if self.n_shared_experts:
            inner = self.n_shared_experts * self.moe_intermediate_size
            shapes |= _mlp_shapes(f"{prefix}.shared_experts", self.hidden_size, inner)
        return shapes


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeWeights:
    """A mixture layer without its routed experts."""

    gate: Projection  # to [n_routed_experts], fp32
    correction_bias: Tensor | None  # [n_routed_experts] fp32
    shared_experts: Mlp | None

    @classmethod
    def read(cls, target: WeightTarget, prefix: str, config: DecoderConfig) -> "MoeWeights":
        """prefix: "model.layers.1.mlp"."""
        bias = target.read_fp32(f"{prefix}.gate.e_score_correction_bias") if config.has_correction_bias else None
        return cls(
            gate=target.project([target.read_fp32(f"{prefix}.gate.weight")]),
            correction_bias=bias,
            shared_experts=target.mlp(f"{prefix}.shared_experts") if config.n_shared_experts else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One decoder layer."""

    norms: BlockNorms
    attention: MlaWeights | KernelMlaWeights
    mlp: Mlp | MoeWeights

    @classmethod
    def read(cls, target: WeightTarget, layer_id: int, config: DecoderConfig) -> "LayerWeights":
        prefix = f"model.layers.{layer_id}"
        is_moe = layer_id in config.moe_layer_ids
        has_kernels = target.use_kernels and can_use_kernels(config.mla)
        attention = KernelMlaWeights if has_kernels else MlaWeights
        return cls(
            norms=BlockNorms(
                attention=target.read(f"{prefix}.input_layernorm.weight"),
                mlp=target.read(f"{prefix}.post_attention_layernorm.weight"),
                eps=config.rms_norm_eps,
            ),
            attention=attention.read(target, f"{prefix}.self_attn", config.mla),
            mlp=MoeWeights.read(target, f"{prefix}.mlp", config) if is_moe else target.mlp(f"{prefix}.mlp"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderWeights:
    """All weights of an attention worker."""

    embedding: Tensor  # [vocab_size, hidden_size]
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [hidden_size]
    lm_head: Projection  # to [vocab_size]; torch shares the embedding's memory when they are tied

    @property
    def weight_bytes(self) -> int:
        """Of all weights, each counted once."""
        return sum(_bytes_by_owner(self).values())

    @classmethod
    def read(
        cls, reader: WeightReader, config: DecoderConfig, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> "DecoderWeights":
        """Reads one tensor at a time: memory never exceeds what is kept by more than the largest tensor."""
        target = WeightTarget.best(reader, dtype, device)
        embedding = target.read("model.embed_tokens.weight")
        return cls(
            embedding=embedding,
            layers=tuple(LayerWeights.read(target, layer_id, config) for layer_id in range(config.num_hidden_layers)),
            norm=target.read("model.norm.weight"),
            lm_head=target.project([embedding]) if config.tie_word_embeddings else target.projection("lm_head.weight"),
        )


def _bytes_by_owner(value: object) -> dict[int, int]:
    """Bytes of every weight below `value`; tensors by their memory, so that shared ones count once."""
    if isinstance(value, Tensor):
        return {value.data_ptr(): value.nbytes}
    if isinstance(value, TorchProjection):
        return {value.weight.data_ptr(): value.nbytes}
    if isinstance(value, tuple):
        return {owner: size for item in value for owner, size in _bytes_by_owner(item).items()}
    if is_dataclass(value):
        return _bytes_by_owner(tuple(getattr(value, field.name) for field in fields(value)))
    size = getattr(value, "nbytes", None)
    return {} if size is None else {id(value): size}


def _attention_shapes(prefix: str, mla: MlaConfig) -> dict[str, tuple[int, ...]]:
    heads = mla.num_attention_heads
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}.kv_a_proj_with_mqa.weight": (mla.latent_dim, mla.hidden_size),
        f"{prefix}.kv_a_layernorm.weight": (mla.kv_lora_rank,),
        f"{prefix}.kv_b_proj.weight": (heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank),
        f"{prefix}.o_proj.weight": (mla.hidden_size, heads * mla.v_head_dim),
    }
    if mla.q_lora_rank is None:
        shapes[f"{prefix}.q_proj.weight"] = (heads * mla.qk_head_dim, mla.hidden_size)
    else:
        shapes[f"{prefix}.q_a_proj.weight"] = (mla.q_lora_rank, mla.hidden_size)
        shapes[f"{prefix}.q_a_layernorm.weight"] = (mla.q_lora_rank,)
        shapes[f"{prefix}.q_b_proj.weight"] = (heads * mla.qk_head_dim, mla.q_lora_rank)
    return shapes


def _mlp_shapes(prefix: str, hidden_size: int, intermediate_size: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (intermediate_size, hidden_size),
        f"{prefix}.up_proj.weight": (intermediate_size, hidden_size),
        f"{prefix}.down_proj.weight": (hidden_size, intermediate_size),
    }
