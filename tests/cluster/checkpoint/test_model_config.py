import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.checkpoint.checkpoint import Checkpoint
from cluster.checkpoint.json_fields import InvalidModelConfig, UnsupportedModel
from cluster.checkpoint.model_config import ModelConfig
from cluster.checkpoint.safetensors_file import InvalidCheckpoint
from router.gate_config import ScoringFunc, TopkMethod
from tests.checkpoints import SHAPES, write_checkpoint

# As published beside DeepSeek-V2-Lite.
V2_LITE: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 102400,
}
V2, V3 = SHAPES["v2"], SHAPES["v3"]


def test_the_published_config_of_v2_lite() -> None:
    config = ModelConfig.from_json(V2_LITE)
    decoder = config.decoder
    assert config.dtype is torch.bfloat16
    assert config.bos_token_id == 100000
    assert decoder.moe_layer_ids == tuple(range(1, 27))
    assert decoder.mla.q_lora_rank is None
    assert decoder.mla.latent_dim == 576
    assert decoder.softmax_scale == pytest.approx(0.114721, abs=1e-6)
    assert decoder.gate.topk_method is TopkMethod.GREEDY
    assert not decoder.has_correction_bias
    routed_bytes = (
        sum(2 * rows * columns for rows, columns in decoder.expert_weight_shapes(1, 0).values())
        * len(decoder.moe_layer_ids)
        * decoder.gate.n_routed_experts
    )
    assert routed_bytes == 28_789_702_656


def test_v3_is_sigmoid_and_bias_even_where_the_config_does_not_say_so() -> None:
    native = {
        name: value for name, value in V3.items() if name not in ("topk_method", "scoring_func", "moe_layer_freq")
    }
    gate = ModelConfig.from_json(native).decoder.gate
    assert ModelConfig.from_json(native) == ModelConfig.from_json(V3)
    assert (gate.topk_method, gate.scoring_func) == (TopkMethod.NOAUX_TC, ScoringFunc.SIGMOID)
    assert gate.norm_topk_prob
    assert gate.routed_scaling_factor == 2.5
    assert ModelConfig.from_json(native).decoder.has_correction_bias


def test_v2_normalises_or_scales_and_never_both() -> None:
    assert ModelConfig.from_json(V2).decoder.gate.routed_scaling_factor == 8.0
    gate = ModelConfig.from_json(V2 | {"norm_topk_prob": True}).decoder.gate
    assert gate.norm_topk_prob
    assert gate.routed_scaling_factor == 1.0
    single = ModelConfig.from_json(V2 | {"norm_topk_prob": True, "num_experts_per_tok": 1}).decoder.gate
    assert (single.norm_topk_prob, single.routed_scaling_factor) == (False, 8.0)


def test_v3_normalises_the_weight_of_a_single_expert_too() -> None:
    gate = ModelConfig.from_json(V3 | {"num_experts_per_tok": 1}).decoder.gate
    assert (gate.norm_topk_prob, gate.routed_scaling_factor) == (True, 2.5)


def test_both_spellings_of_greedy_and_both_of_no_query_lora() -> None:
    assert ModelConfig.from_json(V2_LITE | {"topk_method": "gready", "q_lora_rank": 0}) == ModelConfig.from_json(
        V2_LITE
    )


@pytest.mark.parametrize(
    ("written", "dtype"),
    [
        ({"torch_dtype": "torch.bfloat16"}, torch.bfloat16),
        ({"dtype": "bfloat16", "torch_dtype": "torch.bfloat16"}, torch.bfloat16),
        ({"dtype": "auto", "torch_dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "float16"}, torch.float16),
        ({"dtype": "auto"}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_the_dtype_has_several_spellings(written: dict[str, Any], dtype: torch.dtype) -> None:
    assert ModelConfig.from_json(V2 | written).dtype is dtype


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', supported are 'deepseek_v2' and 'deepseek_v3'"),
        ({"model_type": "deepseek_v32"}, "model_type is 'deepseek_v32'"),
        ({"architectures": ["DeepseekV2ForSequenceClassification"]}, "architectures is"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', supported is 'silu'"),
        ({"attention_bias": True}, "attention_bias is True, supported is false"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config.quant_method is .awq., supported is"),
        ({"sliding_window": 4096}, "sliding_window is 4096"),
        ({"rope_interleave": False}, "rope_interleave is False"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"num_key_value_heads": 2}, "num_key_value_heads is 2, supported is num_attention_heads"),
        ({"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'"),
        ({"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'"),
        ({"torch_dtype": "float64"}, "dtype is 'float64', supported are"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        ModelConfig.from_json(V2 | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topk_method": "group_limited_greedy"}, "topk_method is 'group_limited_greedy', supported is 'noaux_tc'"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax', supported is 'sigmoid'"),
    ],
)
def test_v3_with_the_gate_of_v2_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        ModelConfig.from_json(V3 | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "64"}, "hidden_size is '64', expected an integer"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0, expected an integer"),
        ({"hidden_size": True}, "hidden_size is True, expected an integer"),
        ({"hidden_size": 0}, "hidden_size is 0, must be 1 to"),
        ({"hidden_size": 10**30}, "hidden_size is 1000"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, must be 1 to 4096"),
        ({"kv_lora_rank": -512}, "kv_lora_rank is -512"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim is 7, must be even"),
        ({"qk_head_dim": 99}, "qk_head_dim is 99, contradicts"),
        ({"n_routed_experts": None}, "n_routed_experts is null"),
        ({"n_group": 7}, "n_group 7 does not divide"),
        ({"topk_group": 9}, "topk_group is 9, must be 1 to n_group"),
        ({"num_experts_per_tok": 33}, "num_experts_per_tok is 33"),
        ({"topk_group": 1, "num_experts_per_tok": 6}, "fewer than num_experts_per_tok 6"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6', expected a finite number"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"routed_scaling_factor": float("nan")}, "routed_scaling_factor is nan"),
        ({"routed_scaling_factor": 10**400}, "routed_scaling_factor is 1000.*expected a finite number"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1, expected true or false"),
        ({"model_type": None}, "model_type is null"),
        ({"model_type": ["deepseek_v2"]}, "model_type is .*, expected a string"),
        ({"moe_layer_freq": [0, 1, 1, 1]}, "moe_layer_freq is .*, expected an integer"),
        ({"bos_token_id": 400}, "bos_token_id is 400, must be 0 to 319"),
        ({"torch_dtype": "bfloat16", "dtype": "float32"}, "dtype is 'float32' and torch_dtype is 'bfloat16'"),
    ],
)
def test_what_is_wrong_is_refused_by_name_and_value(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidModelConfig, match=message):
        ModelConfig.from_json(V2 | changes)


@pytest.mark.parametrize("name", sorted(V2))
def test_leaving_out_any_field_gives_a_model_or_a_named_error(name: str) -> None:
    config = {key: value for key, value in V2.items() if key != name}
    try:
        ModelConfig.from_json(config)
    except (InvalidModelConfig, UnsupportedModel) as error:
        assert name in str(error)  # noqa: PT017 - which of the two it is depends on the field


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@given(
    shape=st.sampled_from(["v2", "v3"]), changes=st.dictionaries(st.sampled_from(sorted(V3)), json_values, max_size=3)
)
def test_a_hostile_config_gives_a_model_or_a_named_error(shape: str, changes: dict[str, Any]) -> None:
    try:
        ModelConfig.from_json(SHAPES[shape] | changes)
    except (InvalidModelConfig, UnsupportedModel) as error:
        assert str(error)  # noqa: PT017


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "\udcff", "[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused_with_its_path(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(InvalidCheckpoint, match=r"config\.json"):
        ModelConfig.read(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', supported are"),
        ({"vocab_size": "many"}, "vocab_size is 'many', expected an integer"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', supported is 'silu'"),
        ({"num_experts_per_tok": 99}, "num_experts_per_tok"),
        ({"rope_scaling": {"type": "linear"}}, "rope type is 'linear'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config.quant_method is 'awq'"),
    ],
)
def test_a_fault_of_a_config_is_told_with_the_path_of_its_file(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    path = write_checkpoint(tmp_path, "v2") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises((InvalidModelConfig, UnsupportedModel)) as raised:
        Checkpoint.open(tmp_path).model_config()
    assert str(raised.value).startswith(f"{path}: {message}")
