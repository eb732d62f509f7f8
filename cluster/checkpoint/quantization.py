"""`quantization_config` of config.json: which quantised checkpoints are read, and what is written about ours.

Two kinds: integers as compressed-tensors lays them out (llm-compressor writes it, vLLM reads it), and the 8-bit floats
in blocks of DeepSeek-V3. Which tensors are quantised is not read here: their names and headers say so; `targets` and
`ignore` are for readers that go by module. Knows no tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from cluster.checkpoint.json_fields import InvalidModelConfig, JsonFields
from experts.quantized_matrix import MatrixFormat

COMPRESSED_TENSORS, FP8 = "compressed-tensors", "fp8"
BLOCK_SIZE = 128  # rows and columns of a block of 8-bit floats
# Modules that are linear layers and are not quantised, by how much of a checkpoint is. Beside NOT_EXPERTS the routed
# experts are all that is left; the same expressions stand in published checkpoints (Kimi K2 Thinking), the last two are
# for multi-token prediction. kv_b_proj stays plain: attention uses it in two directions, along which no group lies.
NOT_LINEAR = (r"re:.*mlp\.gate$", r"re:.*kv_b_proj$", r"re:.*eh_proj$", r"re:.*shared_head\.head$")
NOT_EXPERTS = (
    "lm_head",
    r"re:.*self_attn.*",
    r"re:.*shared_experts.*",
    r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
    r"re:.*mlp\.gate$",
    r"re:.*eh_proj$",
    r"re:.*shared_head\.head$",
)


class IntLayout(StrEnum):
    """How integers lie in a file, by the name compressed-tensors gives it."""

    PACKED = "pack-quantized"  # several in an int32
    PLAIN = "int-quantized"  # int8, one an element


@dataclass(frozen=True, slots=True, kw_only=True)
class IntQuantization:
    """Matrices of integers."""

    matrix_format: MatrixFormat
    layout: IntLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Quantization:
    """Matrices of 8-bit floats (e4m3) with a scale for every block of 128 x 128, as DeepSeek-V3 is published."""


Quantization = IntQuantization | Fp8Quantization


def read_quantization(fields: JsonFields) -> Quantization | None:
    """fields: config.json. None for plain weights. Raises UnsupportedModel or InvalidModelConfig."""
    quantization = fields.nested("quantization_config")
    if quantization is None:
        return None
    method = quantization.text("quant_method")
    if method == FP8:
        return _fp8(quantization)
    if method != COMPRESSED_TENSORS:
        raise quantization.unsupported("quant_method", f"{COMPRESSED_TENSORS!r}, {FP8!r}, or no quantization_config")
    return _compressed_tensors(quantization)


def packed_quantization_config(matrix_format: MatrixFormat, ignored: Sequence[str]) -> dict[str, Any]:
    """What to write into config.json when every linear layer but those `ignored` is quantised and packed."""
    return {
        "quant_method": COMPRESSED_TENSORS,
        "format": IntLayout.PACKED.value,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": matrix_format.num_bits,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "channel" if matrix_format.group_size is None else "group",
                    "group_size": matrix_format.group_size,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": list(ignored),
        "kv_cache_scheme": None,
    }


def _fp8(fields: JsonFields) -> Fp8Quantization:
    if fields.values.get("weight_block_size") != [BLOCK_SIZE, BLOCK_SIZE]:
        raise fields.unsupported("weight_block_size", f"[{BLOCK_SIZE}, {BLOCK_SIZE}]")
    if fields.text("fmt", "e4m3") != "e4m3":
        raise fields.unsupported("fmt", "'e4m3'")
    if fields.text("activation_scheme", "dynamic") != "dynamic":
        raise fields.unsupported("activation_scheme", "'dynamic': activations are not quantised here")
    return Fp8Quantization()


def _compressed_tensors(fields: JsonFields) -> IntQuantization:
    layouts = [layout.value for layout in IntLayout]
    if fields.text("format") not in layouts:
        raise fields.unsupported("format", f"one of {layouts}")
    if fields.text("quantization_status", "compressed") not in ("compressed", "frozen"):
        raise fields.unsupported("quantization_status", "'compressed'")
    for name in ("kv_cache_scheme", "sparsity_config", "transform_config", "moe_sparsity_config"):
        if fields.values.get(name) not in (None, {}):
            raise fields.unsupported(name, "null")
    groups = fields.nested("config_groups")
    if groups is None or len(groups.values) != 1:
        raise fields.unsupported("config_groups", "one group: all quantised matrices have the same form")
    (group_name,) = groups.values
    group = groups.nested(group_name)
    if group is None:
        raise groups.unsupported(group_name, "an object")
    layout = IntLayout(fields.text("format"))
    if group.text("format", layout.value) != layout.value:
        raise group.unsupported("format", f"{layout.value!r}, as of the whole checkpoint")
    _check_activations(group)
    weights = group.nested("weights")
    if weights is None:
        raise InvalidModelConfig(f"quantization_config.config_groups.{group_name}.weights is missing")
    return IntQuantization(matrix_format=_matrix_format(weights, layout), layout=layout)


def _check_activations(group: JsonFields) -> None:
    if group.has("output_activations"):
        raise group.unsupported("output_activations", "null")
    activations = group.nested("input_activations")
    if activations is None:
        return
    if activations.values.get("dynamic") is not True:
        # The checkpoint holds no scales of dynamic ones, and the kernels make finer ones of their own: 8 bits by group.
        raise activations.unsupported("dynamic", "true: activations' scales are made while serving")


def _matrix_format(weights: JsonFields, layout: IntLayout) -> MatrixFormat:
    num_bits = weights.integer("num_bits")
    if num_bits not in ((4, 8) if layout is IntLayout.PACKED else (8,)):
        raise weights.unsupported("num_bits", "4 or 8" if layout is IntLayout.PACKED else f"8 in {layout.value!r}")
    if weights.text("type", "int") != "int":
        raise weights.unsupported("type", "'int'")
    if not weights.boolean("symmetric", True):
        raise weights.unsupported("symmetric", "true")
    if weights.values.get("dynamic") not in (None, False):
        raise weights.unsupported("dynamic", "false")
    # "weight" and its old name "static" only say how the numbers were found; "group" permutes the columns.
    if weights.values.get("actorder") not in (None, False, "weight", "static"):
        raise weights.unsupported("actorder", "null or 'weight'")
    if weights.has("block_structure"):
        raise weights.unsupported("block_structure", "null")
    strategy = weights.text("strategy")
    if strategy == "group":
        return MatrixFormat(num_bits=num_bits, group_size=weights.integer("group_size"))
    if strategy != "channel":
        raise weights.unsupported("strategy", "'group' or 'channel'")
    return MatrixFormat(num_bits=num_bits, group_size=None)
