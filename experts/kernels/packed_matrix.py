"""A weight matrix in the kernels' layout (native/kernels.h), packed once, when it is loaded."""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from experts.kernels.library import CMatrix, Format, format_of, require
from experts.quantized_matrix import QuantizedMatrix

PANEL_OUTPUTS = 32  # outputs of a panel; the last panel is padded
ALIGNMENT = 64  # bytes of a cache line
PIECE_OUTPUTS = 4 * PANEL_OUTPUTS  # packed at a time where others shall not wait for long
GROUP_MULTIPLE = 16  # inputs that share a scale come in whole vectors


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedMatrix:
    """One matrix, or several one above the other, each padded to whole panels.

    data: uint8; scales: fp32, for int8 and int4; group_size: inputs that share a scale.
    """

    data: Tensor
    scales: Tensor | None
    number_format: Format
    num_outputs: int  # of all parts, padding between them included
    num_inputs: int
    group_size: int

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def c_matrix(self) -> CMatrix:
        """The struct the kernels take; valid as long as this lives."""
        return CMatrix(
            self.data.data_ptr(),
            None if self.scales is None else self.scales.data_ptr(),
            self.number_format,
            self.num_outputs,
            self.num_inputs,
            self.group_size,
        )


def can_pack(weight: Tensor | QuantizedMatrix) -> bool:
    """Whether the kernels take a matrix of this kind and size."""
    if isinstance(weight, QuantizedMatrix):
        return weight.group_size % GROUP_MULTIPLE == 0
    return weight.dtype is torch.float32 or (weight.dtype is torch.bfloat16 and weight.shape[1] % 2 == 0)


def pack(parts: Sequence[Tensor | QuantizedMatrix], on_packed: Callable[[int], None] | None = None) -> PackedMatrix:
    """The matrices [outputs, inputs] one above the other, all of one kind and with the same inputs.

    on_packed: if given, a few panels are packed at a time, between which others may use the kernels, and it is told of
    the bytes of each time.
    """
    first = parts[0]
    number_format, group_size = _format(first)
    num_inputs = first.shape[1]
    panels = [-(-part.shape[0] // PANEL_OUTPUTS) for part in parts]
    packed = empty(
        number_format,
        num_outputs=(sum(panels[:-1])) * PANEL_OUTPUTS + parts[-1].shape[0],
        num_inputs=num_inputs,
        group_size=group_size,
    )
    first_panel = 0
    for part, num_panels in zip(parts, panels, strict=True):
        assert _format(part) == (number_format, group_size), "parts are of one kind"
        assert part.shape[1] == num_inputs, "parts have the same inputs"
        _pack_part(part, packed, first_panel, on_packed)
        first_panel += num_panels
    return packed


def empty(number_format: Format, *, num_outputs: int, num_inputs: int, group_size: int) -> PackedMatrix:
    """Memory for a matrix. num_outputs: of all parts, padding between them included."""
    num_panels = -(-num_outputs // PANEL_OUTPUTS)
    bits = {Format.FLOAT32: 32, Format.BFLOAT16: 16, Format.INT8: 8, Format.INT4: 4}[number_format]
    return PackedMatrix(
        data=_aligned(num_panels * PANEL_OUTPUTS * num_inputs * bits // 8),
        scales=torch.empty(num_panels * PANEL_OUTPUTS * (num_inputs // group_size)) if group_size else None,
        number_format=number_format,
        num_outputs=num_outputs,
        num_inputs=num_inputs,
        group_size=group_size,
    )


def _format(weight: Tensor | QuantizedMatrix) -> tuple[Format, int]:
    if isinstance(weight, QuantizedMatrix):
        return (Format.INT8 if weight.num_bits == 8 else Format.INT4), weight.group_size
    return format_of(weight.dtype), 0


def _pack_part(
    part: Tensor | QuantizedMatrix, packed: PackedMatrix, first_panel: int, on_packed: Callable[[int], None] | None
) -> None:
    numbers = (part.values if isinstance(part, QuantizedMatrix) else part).contiguous()
    scales = part.scales.float().contiguous() if isinstance(part, QuantizedMatrix) else None
    num_outputs = numbers.shape[0]
    for first in range(0, num_outputs, PIECE_OUTPUTS if on_packed else num_outputs):
        piece = numbers[first : first + PIECE_OUTPUTS] if on_packed else numbers
        require().mobula_pack(
            piece.data_ptr(),
            None if scales is None else scales[first:].data_ptr(),
            ctypes.byref(packed.c_matrix()),
            first_panel + first // PANEL_OUTPUTS,
            piece.shape[0],
        )
        if on_packed:
            on_packed(piece.nbytes)


def _aligned(num_bytes: int) -> Tensor:
    """Uninitialised bytes that start at a cache line."""
    padded = torch.empty(num_bytes + ALIGNMENT, dtype=torch.uint8)
    return padded[-padded.data_ptr() % ALIGNMENT :][:num_bytes]
