"""A weight matrix in the kernels' layout (native/kernels.h), packed once, when it is loaded."""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from experts.kernels import huge_pages
from experts.kernels.library import CMatrix, Format, format_of, instruction_set, require
from experts.quantized_matrix import QuantizedMatrix

PANEL_OUTPUTS = 32  # outputs of a panel; the last panel is padded
ALIGNMENT = 64  # bytes of a cache line
PIECE_OUTPUTS = 4 * PANEL_OUTPUTS  # packed at a time where others shall not wait for long
GROUP_MULTIPLE = 16  # inputs that share a scale come in whole vectors
STEP_INPUTS = 4  # of a compact matrix; this and the next two as in native/compact.h
DICTIONARY = np.dtype([("high_bytes", "u1", 16), ("first_exception", "<i4"), ("num_exceptions", "<i4")])
EXCEPTION = np.dtype([("step", "<i4"), ("numbers", "<u2", STEP_INPUTS * PANEL_OUTPUTS)])
WORTH_IT = 0.9  # of the plain size


Matrix = Tensor | QuantizedMatrix


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedMatrix:
    """One matrix, or several one above the other, each padded to whole panels.

    data: uint8; scales: fp32, for int8 and int4; group_size: inputs that share a scale; dictionaries: uint8, those of a
    compact matrix's panels and then its exceptions.
    """

    data: Tensor
    scales: Tensor | None
    dictionaries: Tensor | None = None
    number_format: Format
    num_outputs: int  # of all parts, padding between them included
    num_inputs: int
    group_size: int

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Its memory."""
        return tuple(part for part in (self.data, self.scales, self.dictionaries) if part is not None)

    @property
    def kind(self) -> tuple[Format, int]:
        """What the kernels compute in one with others: one number format, compact or not, and one group size."""
        is_compact = self.number_format is Format.COMPACT
        return (Format.BFLOAT16 if is_compact else self.number_format), self.group_size

    @property
    def num_panels(self) -> int:
        return _num_panels(self.num_outputs)

    @property
    def num_exceptions(self) -> int:
        """Steps of a compact matrix that are kept as they were."""
        if self.dictionaries is None:
            return 0
        return (self.dictionaries.nbytes - self.num_panels * DICTIONARY.itemsize) // EXCEPTION.itemsize

    def c_matrix(self) -> CMatrix:
        """The struct the kernels take; valid as long as this lives."""
        return CMatrix(
            self.data.data_ptr(),
            None if self.scales is None else self.scales.data_ptr(),
            None if self.dictionaries is None else self.dictionaries.data_ptr(),
            self.number_format,
            self.num_outputs,
            self.num_inputs,
            self.group_size,
        )

    def has_sound_dictionaries(self) -> bool:
        """Whether a matrix from elsewhere names no exception or step that it does not have: the kernels, which do not
        look, would read other memory."""
        if self.dictionaries is None:
            return self.number_format is not Format.COMPACT
        dictionaries, exceptions = _split(self.dictionaries, self.num_panels)
        counts = dictionaries["num_exceptions"].astype(np.int64)
        ends = np.cumsum(counts)
        if (counts < 0).any() or ends[-1] != len(exceptions):
            return False
        steps = exceptions["step"]
        is_first = np.zeros(len(steps), dtype=bool)
        is_first[(ends - counts)[counts > 0]] = True
        return bool(
            (dictionaries["first_exception"] == ends - counts).all()
            and (is_first[1:] | (np.diff(steps) > 0)).all()
            and ((steps >= 0) & (steps < self.num_inputs // STEP_INPUTS)).all()
        )


def can_pack(weight: Matrix) -> bool:
    """Whether the kernels take a matrix of this kind and size."""
    if isinstance(weight, QuantizedMatrix):
        return weight.group_size % GROUP_MULTIPLE == 0
    return weight.dtype is torch.float32 or (weight.dtype is torch.bfloat16 and weight.shape[1] % 2 == 0)


def pack(parts: Sequence[Matrix], on_packed: Callable[[int], None] | None = None) -> PackedMatrix:
    """The matrices [outputs, inputs] one above the other, all of one kind and with the same inputs.

    bfloat16 numbers take 12 bits each where vector instructions decode them and most of them are alike enough.

    on_packed: if given, a few panels are packed at a time, between which others may use the kernels, and it is told of
    the bytes of each time.
    """
    decodes_fast = instruction_set() not in (None, "portable")
    is_taken = _format(parts[0])[0] is Format.BFLOAT16 and parts[0].shape[1] % STEP_INPUTS == 0
    packed = pack_compact(parts, on_packed) if decodes_fast and is_taken else None
    return packed or pack_plain(parts, on_packed)


def pack_plain(parts: Sequence[Matrix], on_packed: Callable[[int], None] | None = None) -> PackedMatrix:
    """As pack, numbers as they are."""
    number_format, group_size = _format(parts[0])
    num_outputs = _num_outputs(parts)
    packed = empty(number_format, num_outputs=num_outputs, num_inputs=parts[0].shape[1], group_size=group_size)
    for piece in _pieces(parts, on_packed is not None):
        scales = None if piece.scales is None else piece.scales.data_ptr()
        matrix = ctypes.byref(packed.c_matrix())
        require().mobula_pack(piece.numbers.data_ptr(), scales, matrix, piece.first_panel, len(piece.numbers))
        if on_packed:
            on_packed(piece.numbers.nbytes)
    huge_pages.gather(packed.data)
    return packed


def pack_compact(
    parts: Sequence[Matrix], on_packed: Callable[[int], None] | None = None, at_most: float = WORTH_IT
) -> PackedMatrix | None:
    """As pack: bfloat16 numbers, with inputs in whole steps, in 12 bits each, to the bit (native/compact.h).

    None where that would take more than `at_most` of the plain size, because too many numbers are rare.
    """
    library = require()
    make = partial(empty, Format.COMPACT, num_outputs=_num_outputs(parts), num_inputs=parts[0].shape[1], group_size=0)
    chosen = make(has_data=False)
    num_exceptions = 0
    for piece in _pieces(parts, on_packed is not None):
        rows = piece.numbers.data_ptr(), ctypes.byref(chosen.c_matrix()), piece.first_panel, len(piece.numbers)
        num_exceptions += library.mobula_choose_dictionaries(*rows, num_exceptions)
    packed = make(num_exceptions=num_exceptions)
    if packed.nbytes > at_most * 2 * packed.num_panels * PANEL_OUTPUTS * packed.num_inputs:
        return None
    assert packed.dictionaries is not None
    assert chosen.dictionaries is not None
    packed.dictionaries[: len(chosen.dictionaries)] = chosen.dictionaries
    for piece in _pieces(parts, on_packed is not None):
        matrix = ctypes.byref(packed.c_matrix())
        library.mobula_pack_compact(piece.numbers.data_ptr(), matrix, piece.first_panel, len(piece.numbers))
        if on_packed:
            on_packed(piece.numbers.nbytes)
    huge_pages.gather(packed.data)
    return packed


def empty(
    number_format: Format,
    *,
    num_outputs: int,
    num_inputs: int,
    group_size: int,
    num_exceptions: int = 0,
    has_data: bool = True,
) -> PackedMatrix:
    """Memory for a matrix, or only for its dictionaries. num_outputs: of all parts, padding between them included."""
    num_panels, is_compact = _num_panels(num_outputs), number_format is Format.COMPACT
    bits = {Format.FLOAT32: 32, Format.BFLOAT16: 16, Format.INT8: 8, Format.INT4: 4, Format.COMPACT: 12}[number_format]
    dictionary_bytes = num_panels * DICTIONARY.itemsize + num_exceptions * EXCEPTION.itemsize
    return PackedMatrix(
        data=_aligned(num_panels * PANEL_OUTPUTS * num_inputs * bits // 8 * has_data),
        scales=torch.empty(num_panels * PANEL_OUTPUTS * (num_inputs // group_size)) if group_size else None,
        dictionaries=torch.empty(dictionary_bytes, dtype=torch.uint8) if is_compact else None,
        number_format=number_format,
        num_outputs=num_outputs,
        num_inputs=num_inputs,
        group_size=group_size,
    )


def _num_panels(num_outputs: int) -> int:
    return -(-num_outputs // PANEL_OUTPUTS)


def _split(dictionaries: Tensor, num_panels: int) -> tuple[npt.NDArray[np.void], npt.NDArray[np.void]]:
    """Those of the panels, and the exceptions."""
    memory, end = dictionaries.numpy(), num_panels * DICTIONARY.itemsize
    return memory[:end].view(DICTIONARY), memory[end:].view(EXCEPTION)


def _format(weight: Matrix) -> tuple[Format, int]:
    if isinstance(weight, QuantizedMatrix):
        return (Format.INT8 if weight.num_bits == 8 else Format.INT4), weight.group_size
    return format_of(weight.dtype), 0


def _num_outputs(parts: Sequence[Matrix]) -> int:
    """Of all parts, padding between them included."""
    return sum(_num_panels(part.shape[0]) for part in parts[:-1]) * PANEL_OUTPUTS + parts[-1].shape[0]


class _Piece(NamedTuple):
    numbers: Tensor  # rows, contiguous
    scales: Tensor | None
    first_panel: int


def _pieces(parts: Sequence[Matrix], are_small: bool) -> Iterator[_Piece]:
    """All rows of the parts, whole panels at a time."""
    first_panel = 0
    for part in parts:
        assert _format(part) == _format(parts[0]), "parts are of one kind"
        assert part.shape[1] == parts[0].shape[1], "parts have the same inputs"
        numbers = (part.values if isinstance(part, QuantizedMatrix) else part).contiguous()
        scales = part.scales.float().contiguous() if isinstance(part, QuantizedMatrix) else None
        num_rows = PIECE_OUTPUTS if are_small else len(numbers)
        for first in range(0, len(numbers), num_rows):
            rows = slice(first, first + num_rows)
            of_piece = None if scales is None else scales[rows]
            yield _Piece(numbers[rows], of_piece, first_panel + first // PANEL_OUTPUTS)
        first_panel += _num_panels(len(numbers))


def _aligned(num_bytes: int) -> Tensor:
    """Uninitialised bytes that start at a cache line."""
    padded = torch.empty(num_bytes + ALIGNMENT, dtype=torch.uint8)
    huge_pages.ask_for(padded)
    return padded[-padded.data_ptr() % ALIGNMENT :][:num_bytes]
