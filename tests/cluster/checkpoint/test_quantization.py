"""Which quantised checkpoints are read, and which are refused by the name of what they ask for."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.checkpoint.json_fields import InvalidModelConfig, JsonFields, UnsupportedModel
from cluster.checkpoint.quantization import (
    NOT_EXPERTS,
    Fp8Quantization,
    IntLayout,
    IntQuantization,
    Quantization,
    packed_quantization_config,
    read_quantization,
)
from experts.quantized_matrix import MatrixFormat

INT4 = MatrixFormat(num_bits=4, group_size=128)
FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}  # as published with DeepSeek-V3
W8A8 = {  # as llm-compressor writes its preset of that name
    "config_groups": {
        "group_0": {
            "format": "int-quantized",
            "input_activations": {
                "dynamic": True,
                "num_bits": 8,
                "strategy": "token",
                "symmetric": True,
                "type": "int",
            },
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None,
                "block_structure": None,
                "dynamic": False,
                "group_size": None,
                "num_bits": 8,
                "observer": "minmax",
                "observer_kwargs": {},
                "strategy": "channel",
                "symmetric": True,
                "type": "int",
            },
        }
    },
    "format": "int-quantized",
    "global_compression_ratio": None,
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
    "sparsity_config": {},
    "transform_config": {},
    "version": "0.12.2",
}


def read(config: dict[str, Any]) -> Quantization | None:
    return read_quantization(JsonFields({"quantization_config": config}))


def changed(**changes: Any) -> dict[str, Any]:
    """Our own int4 configuration; a name with two underscores is one of the weights' fields."""
    config = packed_quantization_config(INT4, NOT_EXPERTS)
    group = config["config_groups"]["group_0"]
    for name, value in changes.items():
        if name.startswith("weights__"):
            if isinstance(group["weights"], dict):  # it may have been changed as a whole
                group["weights"][name.removeprefix("weights__")] = value
        elif name in group:
            group[name] = value
        else:
            config[name] = value
    return config


@pytest.mark.parametrize("matrix_format", [INT4, MatrixFormat(num_bits=8, group_size=None)])
def test_what_we_write_is_what_we_read(matrix_format: MatrixFormat) -> None:
    expected = IntQuantization(matrix_format=matrix_format, layout=IntLayout.PACKED)
    assert read(packed_quantization_config(matrix_format, NOT_EXPERTS)) == expected


def test_published_forms_are_read() -> None:
    assert read_quantization(JsonFields({})) is None
    assert read(FP8) == Fp8Quantization()
    channels = MatrixFormat(num_bits=8, group_size=None)
    assert read(W8A8) == IntQuantization(matrix_format=channels, layout=IntLayout.PLAIN)


def test_formats_are_shown_to_people() -> None:
    assert str(INT4) == "int4 (groups of 128)"
    assert str(MatrixFormat(num_bits=8, group_size=None)) == "int8 (one scale a row)"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq"}, "quantization_config.quant_method is 'gptq', supported is"),
        (FP8 | {"weight_block_size": None}, r"weight_block_size is None, supported is \[128, 128\]"),
        (FP8 | {"weight_block_size": [64, 64]}, r"weight_block_size is \[64, 64\]"),
        (FP8 | {"fmt": "e5m2"}, "fmt is 'e5m2'"),
        (FP8 | {"activation_scheme": "static"}, "activation_scheme is 'static'"),
        (changed(format="marlin-24"), "format is 'marlin-24', supported is one of"),
        (changed(format="int-quantized"), "weights.num_bits is 4, supported is 8 in 'int-quantized'"),
        (changed(quantization_status="calibration"), "quantization_status is 'calibration'"),
        (changed(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme is"),
        (changed(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config is"),
        (changed(config_groups={}), "config_groups is {}, supported is one group"),
        (changed(config_groups={"a": {}, "b": {}}), "supported is one group"),
        (changed(output_activations={"num_bits": 8}), "output_activations is"),
        (changed(input_activations={"num_bits": 8, "dynamic": False}), "input_activations.dynamic is False"),
        (changed(weights__num_bits=3), "weights.num_bits is 3, supported is 4 or 8"),
        (changed(weights__type="float"), "weights.type is 'float'"),
        (changed(weights__symmetric=False), "weights.symmetric is False"),
        (changed(weights__dynamic=True), "weights.dynamic is True"),
        (changed(weights__actorder="group"), "weights.actorder is 'group'"),
        (changed(weights__strategy="tensor"), "weights.strategy is 'tensor', supported is 'group' or 'channel'"),
        (changed(weights__block_structure=[128, 128]), "weights.block_structure is"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        read(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "quantization_config.quant_method is missing"),
        (changed(weights__group_size=None), "weights.group_size is null"),
        (changed(weights__group_size=0), "weights.group_size is 0"),
        (changed(weights__num_bits="4"), "weights.num_bits is '4', expected an integer"),
        (changed(weights=None), "group_0.weights is missing"),
        (changed(config_groups={"W4A16": ["Linear"]}), "W4A16 is .*expected an object"),
    ],
)
def test_what_is_wrong_is_refused_by_name_and_value(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidModelConfig, match=message):
        read(config)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
NAMES = [*packed_quantization_config(INT4, NOT_EXPERTS), "input_activations", "weights"]
NAMES += [f"weights__{name}" for name in ("num_bits", "type", "symmetric", "strategy", "group_size", "actorder")]


@given(changes=st.dictionaries(st.sampled_from(NAMES), json_values, max_size=2))
def test_a_hostile_config_gives_a_form_or_a_named_error(changes: dict[str, Any]) -> None:
    try:
        read(changed(**changes))
    except (InvalidModelConfig, UnsupportedModel) as error:
        assert str(error)  # noqa: PT017
