"""What a Hugging Face config.json says about a DeepSeek-V2 or -V3 model, checked and in our words.

Whatever the file asks for that this system does not compute is refused by name: a model that runs is the model that
was published. Reads no weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from attention.decoder import DecoderConfig
from attention.mla_config import MlaConfig
from cluster.checkpoint.config_defaults import DEFAULTS, V2, V3
from cluster.checkpoint.json_fields import (
    InvalidModelConfig,
    JsonFields,
    UnsupportedModel,
    naming,
    read_json_object,
)
from cluster.checkpoint.quantization import Quantization, read_quantization
from cluster.checkpoint.rotary_fields import read_rotary
from router.gate_config import GateConfig, ScoringFunc, TopkMethod

MAX_HIDDEN_LAYERS = 4096
MAX_ROUTED_EXPERTS = 65536
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}  # those in which a model is served
PUBLISHED_DTYPES = DTYPES | {"float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A model as its checkpoint defines it."""

    model_type: str  # "deepseek_v2" or "deepseek_v3"
    decoder: DecoderConfig
    dtype: torch.dtype  # of the published weights, once dequantised; float32 where the file leaves it open
    bos_token_id: int | None
    quantization: Quantization | None = None  # None: all weights are plain numbers

    def with_own_lm_head(self) -> "ModelConfig":
        """The same with an lm_head that is not the embedding."""
        return replace(self, decoder=replace(self.decoder, tie_word_embeddings=False))

    @classmethod
    def read(cls, path: Path) -> "ModelConfig":
        """Raises InvalidModelConfig or UnsupportedModel."""
        config = read_json_object(path)
        with naming(path):
            return cls.from_json(config)

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """config: config.json as parsed. Raises InvalidModelConfig or UnsupportedModel."""
        model_type = JsonFields(config).text("model_type")
        if model_type not in DEFAULTS:
            raise UnsupportedModel(f"model_type is {model_type!r}, supported are {V2!r} and {V3!r}")
        fields = JsonFields({**DEFAULTS[model_type], **config})
        _refuse_what_is_not_implemented(fields, model_type)
        quantization = read_quantization(fields)
        try:
            decoder = _decoder(fields, model_type)
        except (UnsupportedModel, InvalidModelConfig):
            raise
        except ValueError as error:  # a config dataclass refused its values
            raise InvalidModelConfig(str(error)) from error
        return cls(
            model_type=model_type,
            decoder=decoder,
            dtype=_dtype(fields),
            bos_token_id=fields.optional_integer("bos_token_id", minimum=0, maximum=decoder.vocab_size - 1),
            quantization=quantization,
        )


def _refuse_what_is_not_implemented(fields: JsonFields, model_type: str) -> None:
    if fields.text("hidden_act") != "silu":
        raise fields.unsupported("hidden_act", "'silu'")
    for name in ("attention_bias", "mlp_bias"):
        if fields.boolean(name, False):
            raise fields.unsupported(name, "false")
    if not fields.boolean(
        "rope_interleave", model_type == V2
    ):  # transformers' V2 has no such field, V3's null is false
        raise fields.unsupported("rope_interleave", "true")
    if fields.has("partial_rotary_factor") and fields.number("partial_rotary_factor") != 1.0:
        raise fields.unsupported("partial_rotary_factor", "1.0")
    if fields.has("sliding_window"):
        raise fields.unsupported("sliding_window", "null: full attention")
    architectures = fields.values.get("architectures")
    if architectures is not None and not isinstance(architectures, list):
        raise fields.unsupported("architectures", "a list with a ...ForCausalLM")
    if architectures and not any(str(name).endswith("ForCausalLM") for name in architectures):
        raise fields.unsupported("architectures", "a ...ForCausalLM")


def _decoder(fields: JsonFields, model_type: str) -> DecoderConfig:
    mla = _mla(fields)
    return DecoderConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=mla.hidden_size,
        num_hidden_layers=fields.integer("num_hidden_layers", maximum=MAX_HIDDEN_LAYERS),
        first_k_dense_replace=fields.integer("first_k_dense_replace", minimum=0),
        moe_layer_freq=fields.integer("moe_layer_freq", 1),
        intermediate_size=fields.integer("intermediate_size"),
        moe_intermediate_size=fields.integer("moe_intermediate_size"),
        n_shared_experts=fields.integer("n_shared_experts", 0, minimum=0),  # null: none, as in the published code
        rms_norm_eps=fields.number("rms_norm_eps"),
        max_position_embeddings=fields.integer("max_position_embeddings"),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        mla=mla,
        rotary=read_rotary(fields, mla.qk_rope_head_dim),
        gate=_gate_v2(fields) if model_type == V2 else _gate_v3(fields),
        has_correction_bias=model_type == V3,
    )


def _mla(fields: JsonFields) -> MlaConfig:
    heads = fields.integer("num_attention_heads")
    if fields.integer("num_key_value_heads", heads) != heads:
        raise fields.unsupported("num_key_value_heads", f"num_attention_heads ({heads}): latents serve all heads")
    q_lora_rank = fields.integer("q_lora_rank", 0, minimum=0)
    mla = MlaConfig(
        hidden_size=fields.integer("hidden_size"),
        num_attention_heads=heads,
        q_lora_rank=q_lora_rank or None,  # the published inference code writes 0 for none
        kv_lora_rank=fields.integer("kv_lora_rank"),
        qk_nope_head_dim=fields.integer("qk_nope_head_dim"),
        qk_rope_head_dim=fields.integer("qk_rope_head_dim"),
        v_head_dim=fields.integer("v_head_dim"),
    )
    if fields.integer("qk_head_dim", mla.qk_head_dim) != mla.qk_head_dim:
        raise InvalidModelConfig(
            f"qk_head_dim is {fields.values['qk_head_dim']}, contradicts qk_nope_head_dim + qk_rope_head_dim = "
            f"{mla.qk_head_dim}"
        )
    return mla


def _gate_v2(fields: JsonFields) -> GateConfig:
    methods = {
        "greedy": TopkMethod.GREEDY,
        "gready": TopkMethod.GREEDY,  # so spelled in early checkpoints
        "group_limited_greedy": TopkMethod.GROUP_LIMITED_GREEDY,
    }
    method = fields.text("topk_method")
    if method not in methods:
        raise fields.unsupported("topk_method", f"one of {sorted(methods)} for {V2}")
    if fields.text("scoring_func", "softmax") != "softmax":
        raise fields.unsupported("scoring_func", f"'softmax' for {V2}")
    # The published V2 code normalises *or* scales, and one expert only scales; V3's normalises and then scales.
    is_normalised = fields.boolean("norm_topk_prob", False) and fields.integer("num_experts_per_tok") > 1
    scaling_factor = fields.number("routed_scaling_factor")
    return _gate(
        fields,
        topk_method=methods[method],
        scoring_func=ScoringFunc.SOFTMAX,
        norm_topk_prob=is_normalised,
        routed_scaling_factor=1.0 if is_normalised else scaling_factor,
    )


def _gate_v3(fields: JsonFields) -> GateConfig:
    if fields.text("topk_method", "noaux_tc") != "noaux_tc":  # transformers' own V3 configs leave it out
        raise fields.unsupported("topk_method", f"'noaux_tc' for {V3}")
    if fields.text("scoring_func", "sigmoid") != "sigmoid":
        raise fields.unsupported("scoring_func", f"'sigmoid' for {V3}")
    return _gate(
        fields,
        topk_method=TopkMethod.NOAUX_TC,
        scoring_func=ScoringFunc.SIGMOID,
        norm_topk_prob=fields.boolean("norm_topk_prob", False),
        routed_scaling_factor=fields.number("routed_scaling_factor"),
    )


def _gate(
    fields: JsonFields,
    *,
    topk_method: TopkMethod,
    scoring_func: ScoringFunc,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> GateConfig:
    is_greedy = topk_method is TopkMethod.GREEDY  # which uses no groups, whatever is left over of them
    return GateConfig(
        n_routed_experts=fields.integer("n_routed_experts", maximum=MAX_ROUTED_EXPERTS),
        num_experts_per_tok=fields.integer("num_experts_per_tok"),
        n_group=1 if is_greedy else fields.integer("n_group"),
        topk_group=1 if is_greedy else fields.integer("topk_group"),
        topk_method=topk_method,
        scoring_func=scoring_func,
        norm_topk_prob=norm_topk_prob,
        routed_scaling_factor=routed_scaling_factor,
    )


def _dtype(fields: JsonFields) -> torch.dtype:
    written = [fields.text(name).removeprefix("torch.") for name in ("dtype", "torch_dtype") if fields.has(name)]
    names = [name for name in written if name != "auto"]
    if not names:
        return torch.float32
    if len(set(names)) > 1:
        raise InvalidModelConfig(f"dtype is {names[0]!r} and torch_dtype is {names[1]!r}; keep one of them")
    if names[0] not in PUBLISHED_DTYPES:
        raise UnsupportedModel(f"dtype is {names[0]!r}, supported are {sorted(PUBLISHED_DTYPES)}")
    return PUBLISHED_DTYPES[names[0]]
