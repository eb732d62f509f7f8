"""What config.json says of the rotary embedding."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attention.rotary import YarnConfig
from cluster.checkpoint.json_fields import InvalidModelConfig, UnsupportedModel
from cluster.checkpoint.model_config import ModelConfig
from tests.checkpoints import SHAPES
from tests.cluster.checkpoint.test_model_config import V2_LITE, json_values

V2 = SHAPES["v2"]
YARN, ORIGINAL = V2["rope_scaling"], "original_max_position_embeddings"
WITHOUT_ORIGINAL = {name: value for name, value in YARN.items() if name != ORIGINAL}


def test_the_rewritten_rope_parameters_mean_what_the_published_rope_scaling_means() -> None:
    rewritten = {name: value for name, value in V2_LITE.items() if name not in ("rope_scaling", "rope_theta")}
    rope = {name: value for name, value in V2_LITE["rope_scaling"].items() if name != "type"}
    rewritten["rope_parameters"] = rope | {"rope_type": "yarn", "rope_theta": 10000.0}
    rewritten["dtype"] = rewritten.pop("torch_dtype")
    assert ModelConfig.from_json(rewritten) == ModelConfig.from_json(V2_LITE)


def test_no_rope_scaling_is_plain_rotary_embedding() -> None:
    for rope in (None, {}, {"type": "default"}):
        assert ModelConfig.from_json(V2_LITE | {"rope_scaling": rope}).decoder.rotary.yarn is None
    yarn = ModelConfig.from_json(V2_LITE).decoder.rotary.yarn
    assert yarn == YarnConfig(factor=40, original_max_position_embeddings=4096, mscale=0.707, mscale_all_dim=0.707)


@pytest.mark.parametrize("rope", [YARN, {"type": "default"}])
def test_a_partial_rotary_factor_of_one_changes_nothing(rope: dict[str, Any]) -> None:
    written = {"rope_scaling": rope | {"partial_rotary_factor": 1.0}}
    assert ModelConfig.from_json(V2 | written) == ModelConfig.from_json(V2 | {"rope_scaling": rope})


@pytest.mark.parametrize("scaling", [YARN, {}, None])
def test_both_spellings_at_once_may_say_the_same(scaling: dict[str, Any] | None) -> None:
    rewritten = {name: value for name, value in YARN.items() if name != "type"}
    rewritten |= {"rope_type": "yarn", "rope_theta": 10000.0, "partial_rotary_factor": 1.0, "factor": 40.0}
    both = V2 | {"rope_scaling": scaling, "rope_parameters": rewritten}
    assert ModelConfig.from_json(both) == ModelConfig.from_json(V2)


def test_the_length_that_yarn_stretches_may_stand_beside_it_or_be_the_whole_length() -> None:
    beside = V2 | {"rope_scaling": WITHOUT_ORIGINAL, ORIGINAL: 512}
    assert ModelConfig.from_json(beside) == ModelConfig.from_json(V2)
    yarn = ModelConfig.from_json(V2 | {"rope_scaling": WITHOUT_ORIGINAL}).decoder.rotary.yarn
    assert yarn is not None
    assert yarn.original_max_position_embeddings == V2["max_position_embeddings"]


def test_the_length_that_yarn_stretches_may_be_written_as_a_float() -> None:
    assert ModelConfig.from_json(V2 | {"rope_scaling": YARN | {ORIGINAL: 512.0}}) == ModelConfig.from_json(V2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"type": "longrope"}}, "rope type is 'longrope', supported are 'default' and 'yarn'"),
        ({"rope_scaling": YARN | {"truncate": False}}, "rope_scaling.truncate is False"),
        ({"rope_scaling": YARN | {"attention_factor": 1.5}}, "rope_scaling.attention_factor is 1.5"),
        (
            {"rope_scaling": YARN | {"finetuned": True}},
            "rope_scaling.finetuned is True, but no such key is supported; supported are attention_factor, beta_fast, ",
        ),
        *(
            ({"rope_scaling": rope | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5, supported is 1.0")
            for rope in (YARN, {"type": "default"})
        ),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        ModelConfig.from_json(V2 | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', expected an object"),
        ({"rope_scaling": YARN | {ORIGINAL: 512.5}}, "original_max_position_embeddings is 512.5, expected an integer"),
        ({"rope_scaling": YARN | {ORIGINAL: 1e300}}, "original_max_position_embeddings is 1000.* must be 1 to"),
        (
            {"rope_scaling": YARN, ORIGINAL: 128},
            "original_max_position_embeddings is 128 and 512 among yarn's values; keep one of them",
        ),
        ({"rope_scaling": YARN | {"factor": 0.5}}, "factor is 0.5"),
        ({"rope_scaling": YARN | {"rope_type": "default"}}, "rope_type is 'default' and type is 'yarn'"),
        ({"rope_parameters": {"rope_type": "default"}}, "contradict"),
        ({"rope_theta": -1}, "rope_theta is -1"),
    ],
)
def test_what_is_wrong_is_refused_by_name_and_value(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidModelConfig, match=message):
        ModelConfig.from_json(V2 | changes)


@given(changes=st.dictionaries(st.sampled_from(sorted(YARN)), json_values, max_size=3))
def test_a_hostile_rope_scaling_gives_a_model_or_a_named_error(changes: dict[str, Any]) -> None:
    try:
        config = ModelConfig.from_json(V2 | {"rope_scaling": YARN | changes})
    except (InvalidModelConfig, UnsupportedModel) as error:
        assert str(error)  # noqa: PT017
    else:
        assert config.decoder.softmax_scale > 0
        config.decoder.rotary.inverse_frequencies()
