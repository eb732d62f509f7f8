"""How one quantised matrix lies in a checkpoint: its tensors' names, dtypes and shapes, packed and unpacked.

Names are those of compressed-tensors and of DeepSeek-V3; `stem` is the matrix's published name without ".weight".
Knows no files. A file's bytes are little-endian, as this machine's are taken to be.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cluster.checkpoint.quantization import BLOCK_SIZE, Fp8Quantization, IntLayout, Quantization
from experts.quantized_matrix import MatrixFormat, QuantizedMatrix

PACKED, SCALE, SHAPE, FP8_SCALE = "_packed", "_scale", "_shape", "_scale_inv"  # after the published name
# By byte; looking up is several times as fast as computing. The two numbers of four bits in a byte, as two int8; the
# float8_e4m3fn that a byte is, as fp32.
PAIRS = np.array([[(byte & 15) - 8, (byte >> 4) - 8] for byte in range(256)], dtype=np.int8).view(np.int16)[:, 0]
FLOATS = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class PartHeader:
    """What a tensor's header must say."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]  # one of them


def parts_of(shape: tuple[int, ...], quantization: Quantization) -> dict[str, PartHeader]:
    """The tensors that make up a matrix of this shape, by what follows its published name.

    Raises ValueError for a shape that this form cannot hold.
    """
    if len(shape) != 2:
        raise ValueError(f"it has shape {list(shape)}, and only matrices are quantised")
    num_rows, num_columns = shape
    if isinstance(quantization, Fp8Quantization):
        blocks = (-(-num_rows // BLOCK_SIZE), -(-num_columns // BLOCK_SIZE))
        return {
            "": PartHeader(shape=shape, dtypes=(torch.float8_e4m3fn,)),
            FP8_SCALE: PartHeader(shape=blocks, dtypes=(torch.float32,)),
        }
    matrix_format = quantization.matrix_format
    group_size = matrix_format.group_size or num_columns
    if num_columns % group_size:
        raise ValueError(f"its {num_columns} columns do not divide into groups of {group_size}")
    scale = PartHeader(shape=(num_rows, num_columns // group_size), dtypes=SCALE_DTYPES)
    if quantization.layout is IntLayout.PLAIN:
        return {"": PartHeader(shape=shape, dtypes=(torch.int8,)), SCALE: scale}
    if num_columns % numbers_per_word(matrix_format):
        raise ValueError(f"its {num_columns} columns do not fill whole words of {numbers_per_word(matrix_format)}")
    packed_shape = (num_rows, num_columns // numbers_per_word(matrix_format))
    return {
        PACKED: PartHeader(shape=packed_shape, dtypes=(torch.int32,)),
        SCALE: scale,
        SHAPE: PartHeader(shape=(2,), dtypes=(torch.int64,)),
    }


def numbers_per_word(matrix_format: MatrixFormat) -> int:
    """Numbers in one int32 of a packed matrix."""
    return 32 // matrix_format.num_bits


def pack(matrix: QuantizedMatrix) -> dict[str, Tensor]:
    """The tensors of the packed layout. Scales become bfloat16: QuantizedMatrix.quantize makes them so."""
    if matrix.num_bits == 8:
        packed = matrix.values.view(torch.uint8) ^ 0x80  # value + 128
    else:
        numbers = (matrix.values + 8).view(torch.uint8)
        packed = numbers[:, 0::2] | (numbers[:, 1::2] << 4)  # the first column in the low bits
    return {
        PACKED: packed.contiguous().view(torch.int32),
        SCALE: matrix.scales.to(torch.bfloat16),
        SHAPE: torch.tensor(matrix.shape),
    }


def unpack(parts: Mapping[str, Tensor], matrix_format: MatrixFormat) -> QuantizedMatrix:
    """parts: the tensors of either integer layout, with the shapes that parts_of says."""
    if PACKED not in parts:
        values = parts[""]
    elif matrix_format.num_bits == 8:
        values = (parts[PACKED].view(torch.uint8) ^ 0x80).view(torch.int8)
    else:
        packed = parts[PACKED].view(torch.uint8).numpy()  # [num_rows, num_columns / 2]
        values = torch.from_numpy(PAIRS[packed].view(np.int8))
    return QuantizedMatrix(
        values=values,
        scales=parts[SCALE].float(),
        num_bits=matrix_format.num_bits,
        group_size=matrix_format.group_size or values.shape[1],
    )


def dequantize_blocks(weight: Tensor, scales: Tensor) -> Tensor:
    """weight: [num_rows, num_columns] float8_e4m3fn; scales: one for each 128 x 128 block, fp32, multiplied despite the
    published name. Returns bfloat16; a block of rows at a time, so that little memory is needed beyond the result.
    """
    num_rows, num_columns = weight.shape
    result = torch.empty(num_rows, num_columns, dtype=torch.bfloat16)
    for block, start in enumerate(range(0, num_rows, BLOCK_SIZE)):
        rows = slice(start, min(start + BLOCK_SIZE, num_rows))
        scale = scales[block].repeat_interleave(BLOCK_SIZE)[:num_columns]
        result[rows] = torch.from_numpy(FLOATS[weight[rows].view(torch.uint8).numpy()]).mul_(scale)
    return result
