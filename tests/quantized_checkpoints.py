"""Turns a checkpoint of tests/checkpoints.py into a quantised one, straight from the formats' descriptions: slowly."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.checkpoints import write_checkpoint

FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def rewrite(
    folder: Path, quantization_config: dict[str, Any], change: Callable[[str, Tensor], dict[str, Tensor]]
) -> Path:
    """Replaces each tensor by those that `change` makes of it."""
    path = folder / "model.safetensors"
    tensors = {new: made for name, tensor in load_file(path).items() for new, made in change(name, tensor).items()}
    save_file(tensors, path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization_config}))
    return folder


def write_fp8_checkpoint(folder: Path, shape: str = "v3", **changes: Any) -> Path:
    """As DeepSeek-V3 is published: the projections in 8-bit floats, everything else in bfloat16."""

    def change(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if not name.endswith("_proj.weight") and "kv_a_proj" not in name:
            return {name: tensor}
        num_rows, num_columns = tensor.shape
        scales = torch.zeros(-(-num_rows // 128), -(-num_columns // 128))
        quantized = torch.zeros(tensor.shape, dtype=torch.float8_e4m3fn)
        for row in range(0, num_rows, 128):
            for column in range(0, num_columns, 128):
                block = tensor[row : row + 128, column : column + 128].float()
                scale = block.abs().max() / 448
                scales[row // 128, column // 128] = scale
                quantized[row : row + 128, column : column + 128] = (block / scale).to(torch.float8_e4m3fn)
        return {name: quantized, f"{name}_scale_inv": scales}

    return rewrite(write_checkpoint(folder, shape, dtype=torch.bfloat16, **changes), FP8_CONFIG, change)


def multiplied_out(weight: Tensor, scales: Tensor) -> Tensor:
    """The oracle for one matrix of 8-bit floats: every element times its block's scale."""
    result = torch.zeros(weight.shape)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            result[row, column] = weight[row, column].float() * scales[row // 128, column // 128]
    return result.bfloat16()
