"""Quantised checkpoints of others: DeepSeek-V3's blocks of 8-bit floats, int8 with one scale a row."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cluster.checkpoint.checkpoint import Checkpoint, InvalidCheckpoint
from experts.quantized_matrix import QuantizedMatrix
from tests.checkpoints import write_checkpoint
from tests.cluster.checkpoint.test_quantization import W8A8
from tests.quantized_checkpoints import multiplied_out, rewrite, write_fp8_checkpoint

SIZES = {"hidden_size": 192, "moe_intermediate_size": 136, "n_routed_experts": 16, "num_hidden_layers": 2}


def test_every_tensor_of_an_fp8_checkpoint_is_multiplied_out_and_the_others_are_as_they_are(tmp_path: Path) -> None:
    folder = write_fp8_checkpoint(tmp_path, "v3", **SIZES)
    tensors = load_file(folder / "model.safetensors")
    checkpoint = Checkpoint.open(folder)
    decoder = checkpoint.model_config().decoder
    shapes = decoder.weight_shapes() | decoder.expert_weight_shapes(1, 3)
    checkpoint.check_role(shapes)
    num_multiplied = 0
    for name, shape in shapes.items():
        found, stored = checkpoint.read(name), tensors[name]
        assert found.dtype is checkpoint.dtype(name) is (torch.float32 if "bias" in name else torch.bfloat16)
        assert tuple(found.shape) == checkpoint.shape(name) == shape
        is_quantised = f"{name}_scale_inv" in tensors
        num_multiplied += is_quantised
        expected = multiplied_out(stored, tensors[f"{name}_scale_inv"]) if is_quantised else stored
        assert torch.equal(found, expected), name
        matrix = checkpoint.read_matrix(name)
        assert isinstance(matrix, Tensor)
        assert torch.equal(matrix, expected)
    assert num_multiplied == 2 * 5 + 3 + 3 + 3  # attention, dense layer, shared expert, routed expert
    assert checkpoint.matrix_format("model.layers.1.mlp.experts.3.up_proj.weight") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda scales: None, r"tensor model\.layers\.0\.self_attn\.o_proj\.weight has dtype float8_e4m3fn"),
        (lambda scales: scales[:1], r"o_proj\.weight_scale_inv has shape \[1, 1\], config\.json implies \[2, 1\]"),
        (lambda scales: scales.half(), r"o_proj\.weight_scale_inv has dtype float16, expected one of \['float32'\]"),
    ],
)
def test_scales_that_are_missing_or_wrong_are_named(tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    folder = write_fp8_checkpoint(tmp_path, "v3", **SIZES)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    changed = change(tensors.pop(name))
    save_file(tensors | ({} if changed is None else {name: changed}), folder / "model.safetensors")
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(InvalidCheckpoint, match=message):
        checkpoint.check_role(checkpoint.model_config().decoder.weight_shapes())


def test_int8_with_one_scale_a_row_is_read_whichever_matrices_have_it(tmp_path: Path) -> None:
    def change(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if "_proj" not in name:
            return {name: tensor}
        scales = tensor.abs().amax(dim=1, keepdim=True) / 127
        return {name: (tensor / scales).round().to(torch.int8), f"{name}_scale": scales}

    folder = rewrite(write_checkpoint(tmp_path, "v2"), W8A8, change)
    tensors = load_file(folder / "model.safetensors")
    checkpoint = Checkpoint.open(folder)
    decoder = checkpoint.model_config().decoder
    checkpoint.check_role(decoder.weight_shapes() | decoder.expert_weight_shapes(1, 0))
    for name in ("model.layers.1.mlp.experts.0.down_proj.weight", "model.layers.0.self_attn.o_proj.weight"):
        expected = tensors[name].float() * tensors[f"{name}_scale"]
        assert torch.equal(checkpoint.read(name), expected)
        matrix = checkpoint.read_matrix(name)
        assert isinstance(matrix, QuantizedMatrix)
        assert matrix.group_size == expected.shape[1]


def test_scales_without_a_configuration_are_refused(tmp_path: Path) -> None:
    folder = write_fp8_checkpoint(tmp_path, "v3", **SIZES)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": None}))
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(InvalidCheckpoint, match="_scale_inv, which contradicts quantization_config"):
        checkpoint.check_role(checkpoint.model_config().decoder.weight_shapes())
