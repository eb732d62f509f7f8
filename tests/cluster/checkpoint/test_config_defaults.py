"""Fields that a config.json leaves out, and fields that it sets to null."""

from typing import Any

import pytest
from transformers import DeepseekV2Config, DeepseekV3Config

from cluster.checkpoint.config_defaults import DEFAULTS
from cluster.checkpoint.json_fields import InvalidModelConfig, UnsupportedModel
from cluster.checkpoint.model_config import ModelConfig
from tests.checkpoints import SHAPES

V2, V2_LITE, V3 = SHAPES["v2"], SHAPES["v2_lite"], SHAPES["v3"]
TRANSFORMERS = {"deepseek_v2": DeepseekV2Config, "deepseek_v3": DeepseekV3Config}


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}


@pytest.mark.parametrize("model_type", sorted(DEFAULTS))
def test_the_defaults_are_those_of_transformers(model_type: str) -> None:
    published = TRANSFORMERS[model_type]().to_dict()
    assert DEFAULTS[model_type] == {name: published[name] for name in DEFAULTS[model_type]}


@pytest.mark.parametrize(
    ("published", "names"),
    [
        (V2, ("n_shared_experts", "rms_norm_eps", "norm_topk_prob", "tie_word_embeddings", "hidden_act")),
        (V2_LITE, ("n_shared_experts", "topk_method", "routed_scaling_factor", "n_group", "topk_group")),
        (V3, ("n_shared_experts", "norm_topk_prob", "routed_scaling_factor", "rope_interleave", "attention_bias")),
    ],
)
def test_a_field_that_is_left_out_has_its_published_value(published: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        assert ModelConfig.from_json(without(published, name)) == ModelConfig.from_json(published), name


def test_groups_and_dense_layers_that_are_left_out_are_v3s() -> None:
    decoder = ModelConfig.from_json(without(V3, "n_group", "topk_group", "first_k_dense_replace")).decoder
    assert (decoder.gate.n_group, decoder.gate.topk_group, decoder.first_k_dense_replace) == (8, 4, 3)
    assert ModelConfig.from_json(without(V2, "first_k_dense_replace")).decoder.first_k_dense_replace == 0


@pytest.mark.parametrize("published", [V2, V3])
def test_null_shared_experts_are_none_and_null_switches_are_off(published: dict[str, Any]) -> None:
    decoder = ModelConfig.from_json(published | {"n_shared_experts": None, "norm_topk_prob": None}).decoder
    assert decoder.n_shared_experts == 0
    assert not decoder.gate.norm_topk_prob


def test_a_null_rope_interleave_is_none_for_v3_and_nothing_for_v2() -> None:
    with pytest.raises(UnsupportedModel, match="rope_interleave is None, supported is true"):
        ModelConfig.from_json(V3 | {"rope_interleave": None})
    assert ModelConfig.from_json(V2 | {"rope_interleave": None}) == ModelConfig.from_json(V2)


@pytest.mark.parametrize(
    ("published", "name"),
    [
        *((V3, name) for name in ("n_group", "topk_group", "routed_scaling_factor", "first_k_dense_replace")),
        *((V2, name) for name in ("n_group", "topk_group", "topk_method", "num_experts_per_tok", "hidden_size")),
    ],
)
def test_a_null_that_means_nothing_is_refused_by_name(published: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidModelConfig, match=f"{name} is null, expected"):
        ModelConfig.from_json(published | {name: None})


@pytest.mark.parametrize("name", ["n_group", "topk_group", "num_experts_per_tok"])
def test_what_has_no_default_must_be_there(name: str) -> None:
    with pytest.raises(InvalidModelConfig, match=f"{name} is missing, expected"):
        ModelConfig.from_json(without(V2, name))
