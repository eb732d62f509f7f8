"""An expert's weights as frames of bounded size, and back: how a shard gives a copy to another. Pure.

What is copied is what the kernels read: nothing is unpacked, converted or packed again, so the copy has the same bits.
Knows nothing of gRPC.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from experts.grouped_ffn import ExpertWeights
from experts.kernels import huge_pages
from experts.kernels.expert_set import PackedExpert
from experts.kernels.library import Format
from experts.kernels.packed_matrix import PANEL_OUTPUTS, STEP_INPUTS, PackedMatrix, empty
from experts.weight_store import Expert, ExpertModel
from protos import expert_pb2
from protos.codec import decode_frame, join_frame
from protos.errors import MobulaError

FRAME_BYTES = 512 * 1024  # so that a frame holds up neither end's event loop

_FORMATS = {format_: getattr(expert_pb2, f"WEIGHT_FORMAT_{format_.name}") for format_ in Format}
_DTYPES = {torch.float32: Format.FLOAT32, torch.bfloat16: Format.BFLOAT16}
_BY_WIRE = {wire: format_ for format_, wire in _FORMATS.items()}


class CopyError(Exception):
    """A copy did not arrive as it should; the weights can still be read from the checkpoint."""


def frames(expert: Expert) -> Iterator[bytes]:
    """The CopyExpertResponses, each with its checksum; a small expert is one."""
    header = expert_pb2.CopyExpertHeader(matrices=[_described(matrix) for matrix in (expert.w13, expert.w2)])
    parts: list[memoryview] = []
    room = FRAME_BYTES
    for memory in _memory(expert):
        left = memory
        while left:
            parts.append(left[:room])
            left, room = left[len(parts[-1]) :], room - len(parts[-1])
            if not room:
                yield join_frame(header.SerializeToString(), parts)
                header, parts, room = expert_pb2.CopyExpertHeader(), [], FRAME_BYTES
    if parts:
        yield join_frame(header.SerializeToString(), parts)


class ExpertCopy:
    """Puts an expert together from frames in their order."""

    def __init__(self, model: ExpertModel) -> None:
        self._model = model
        self._expert: Expert | None = None
        self._left: list[memoryview] = []  # memory that is not written yet

    def add(self, frame: bytes) -> int:
        """Takes a frame; the number of bytes of weights in it. Raises CopyError."""
        try:
            header, payload = decode_frame(expert_pb2.CopyExpertHeader, frame)
        except MobulaError as error:
            raise CopyError(str(error)) from error
        if self._expert is None:
            self._expert = _allocated(header, self._model)
            self._left = list(_memory(self._expert))
        num_bytes = len(payload)
        while payload:
            if not self._left:
                raise CopyError(f"{len(payload)} bytes come after the expert's last one")
            count = min(len(payload), len(self._left[0]))
            self._left[0][:count] = payload[:count]
            payload, self._left[0] = payload[count:], self._left[0][count:]
            if not self._left[0]:
                del self._left[0]
        return num_bytes

    def expert(self) -> Expert:
        """Once the last frame was taken. Raises CopyError before."""
        if self._expert is None or self._left:
            missing = sum(map(len, self._left))
            raise CopyError(f"the stream of an expert's weights ended early: {missing or 'all'} bytes are missing")
        for matrix in (self._expert.w13, self._expert.w2):
            if not isinstance(matrix, PackedMatrix):
                continue
            if not matrix.has_sound_dictionaries():
                raise CopyError("a compact matrix of the copy names exceptions that it does not have")
            huge_pages.gather(matrix.data)
        return self._expert


def _described(matrix: PackedMatrix | Tensor) -> expert_pb2.WeightMatrix:
    if isinstance(matrix, Tensor):
        return expert_pb2.WeightMatrix(
            format=_FORMATS[_DTYPES[matrix.dtype]], num_outputs=matrix.shape[0], num_inputs=matrix.shape[1]
        )
    return expert_pb2.WeightMatrix(
        format=_FORMATS[matrix.number_format],
        num_outputs=matrix.num_outputs,
        num_inputs=matrix.num_inputs,
        group_size=matrix.group_size,
        is_packed=True,
        num_exceptions=matrix.num_exceptions,
    )


def _allocated(header: expert_pb2.CopyExpertHeader, model: ExpertModel) -> Expert:
    """Memory for what the first frame describes. Raises CopyError where that is no expert of the model."""
    inner, hidden = model.moe_intermediate_size, model.hidden_size
    padded = -(-inner // PANEL_OUTPUTS) * PANEL_OUTPUTS
    if len(header.matrices) != 2:
        raise CopyError(f"the first frame describes {len(header.matrices)} matrices, an expert has 2")
    is_packed = header.matrices[0].is_packed
    shapes = (((padded if is_packed else inner) + inner, hidden), (hidden, inner))
    for matrix, shape in zip(header.matrices, shapes, strict=True):
        group_size = matrix.group_size
        if (
            (matrix.num_outputs, matrix.num_inputs) != shape
            or matrix.is_packed is not is_packed
            or matrix.format not in _BY_WIRE
            or (group_size and (matrix.num_inputs % group_size or not is_packed))
            or (not is_packed and _BY_WIRE[matrix.format] is not _DTYPES.get(model.dtype))
            or matrix.num_exceptions > _max_exceptions(matrix)
            or (_BY_WIRE[matrix.format] is Format.COMPACT and matrix.num_inputs % STEP_INPUTS)
        ):
            raise CopyError(f"a matrix of the copy is {str(matrix).split()}, the model's are {list(shape)}")
    if is_packed:
        w13, w2 = (
            empty(
                _BY_WIRE[matrix.format],
                num_outputs=matrix.num_outputs,
                num_inputs=matrix.num_inputs,
                group_size=matrix.group_size,
                num_exceptions=matrix.num_exceptions,
            )
            for matrix in header.matrices
        )
        return PackedExpert(w13=w13, w2=w2)
    return ExpertWeights(
        w13=torch.empty((2 * inner, hidden), dtype=model.dtype), w2=torch.empty((hidden, inner), dtype=model.dtype)
    )


def _max_exceptions(matrix: expert_pb2.WeightMatrix) -> int:
    """Every step of every panel of a compact matrix."""
    if _BY_WIRE.get(matrix.format) is not Format.COMPACT:
        return 0
    return -(-matrix.num_outputs // PANEL_OUTPUTS) * (matrix.num_inputs // STEP_INPUTS)


def _memory(expert: Expert) -> Iterator[memoryview]:
    """The bytes of both matrices, each with its scales or dictionaries, in place."""
    for matrix in (expert.w13, expert.w2):
        for part in (matrix,) if isinstance(matrix, Tensor) else matrix.parts:
            yield part.view(-1).view(torch.uint8).numpy().data
