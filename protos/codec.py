"""Frames of the data plane: a protobuf header and raw tensor bytes in one valid message, without copying the payload.

A frame is `header = 1` (a message) followed by `payload = 2` (bytes); see expert.proto. Writing copies the parts once;
reading gives views into the received bytes. The header's last field is a checksum of both: TCP's own misses one damaged
segment in 65,536, and proxies compute it anew. Knows nothing of what the tensors mean.
"""

import ctypes
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from google.protobuf.message import DecodeError, Message
from torch import Tensor

from protos import tensor_pb2
from protos.errors import CorruptFrame, InvalidRequest

_HEADER_TAG = 0x0A  # field 1, length-delimited
_PAYLOAD_TAG = 0x12  # field 2, length-delimited
_HEADER_KEY, _PAYLOAD_KEY = bytes((_HEADER_TAG,)), bytes((_PAYLOAD_TAG,))
_CHECKSUM = struct.Struct("<BI")  # the tag of field 15, fixed32, and the CRC-32
_CHECKSUM_TAG = 0x7D
MAX_HEADER_BYTES = 64 * 1024  # an error with its message is the longest

_TO_WIRE = {torch.float32: tensor_pb2.DTYPE_FLOAT32, torch.bfloat16: tensor_pb2.DTYPE_BFLOAT16}
_FROM_WIRE: dict[int, torch.dtype] = {wire: dtype for dtype, wire in _TO_WIRE.items()}

# Bytes without content, to be written before anybody else has them, as PyBytes_FromStringAndSize allows.
_new_bytes: Callable[[None, int], bytes] = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_char_p, ctypes.c_ssize_t)(
    ("PyBytes_FromStringAndSize", ctypes.pythonapi)
)
_address_of: Callable[[bytes], int] = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object)(
    ("PyBytes_AsString", ctypes.pythonapi)
)

HeaderT = TypeVar("HeaderT", bound=Message)


def dtype_to_wire(dtype: torch.dtype) -> tensor_pb2.DType:
    """The wire's name of a torch dtype."""
    return _TO_WIRE[dtype]


def dtype_from_wire(wire: int) -> torch.dtype:
    """The torch dtype of a wire name. Raises InvalidRequest for one that is unset or unknown."""
    if wire not in _FROM_WIRE:
        raise InvalidRequest(
            f"dtype {wire} is not one of {sorted(_FROM_WIRE)} (float32, bfloat16)", field="header.dtype"
        )
    return _FROM_WIRE[wire]


def join_frame(header: bytes, parts: Sequence[memoryview]) -> bytes:
    """One message of a serialised header without checksum and a payload in parts, which are contiguous bytes."""
    payload_bytes, crc = 0, zlib.crc32(header)
    for part in parts:
        payload_bytes += part.nbytes
        crc = zlib.crc32(part, crc)
    checksum = _CHECKSUM.pack(_CHECKSUM_TAG, crc)
    length = _varint(len(header) + len(checksum))
    return b"".join((_HEADER_KEY, length, header, checksum, _PAYLOAD_KEY, _varint(payload_bytes), *parts))


def write_frame(header: bytes, payload_bytes: int, write_payload: Callable[[int], object]) -> bytes:
    """The same, of a payload that `write_payload` puts to the address it is given: it is written once, in place."""
    length = _varint(len(header) + _CHECKSUM.size)
    payload_key = _PAYLOAD_KEY + _varint(payload_bytes)
    start = len(_HEADER_KEY) + len(length) + len(header) + _CHECKSUM.size + len(payload_key)
    frame = _new_bytes(None, start + payload_bytes)
    address = _address_of(frame)
    write_payload(address + start)
    checksum = _CHECKSUM.pack(_CHECKSUM_TAG, zlib.crc32(memoryview(frame)[start:], zlib.crc32(header)))
    before = (ctypes.c_char * start).from_address(address)
    before.raw = b"".join((_HEADER_KEY, length, header, checksum, payload_key))
    return frame


def decode_frame(header_class: type[HeaderT], frame: bytes) -> tuple[HeaderT, memoryview]:
    """The header and a view of the payload (empty if there is none).

    Raises InvalidRequest for a frame that is truncated, has other fields, or lengths that do not fit; CorruptFrame for
    one whose checksum is not right or not there: damage may hide it among other fields.
    """
    header_start, header_length = _field(frame, 0, _HEADER_TAG)
    if header_length > MAX_HEADER_BYTES:
        raise InvalidRequest(f"frame header has {header_length} bytes, limit is {MAX_HEADER_BYTES}")
    header_end = header_start + header_length
    header_bytes = frame[header_start:header_end]
    try:
        header = header_class.FromString(header_bytes)
    except DecodeError as error:
        raise InvalidRequest(f"frame header is not a valid {header_class.DESCRIPTOR.full_name}: {error}") from error
    payload = memoryview(b"")
    if header_end < len(frame):
        payload_start, payload_length = _field(frame, header_end, _PAYLOAD_TAG)
        if payload_start + payload_length != len(frame):
            raise InvalidRequest(f"frame has {len(frame) - payload_start - payload_length} bytes after its payload")
        payload = memoryview(frame)[payload_start:]
    _check(header_bytes, payload)
    return header, payload


def _check(header: bytes, payload: memoryview) -> None:
    if len(header) < _CHECKSUM.size or header[-_CHECKSUM.size] != _CHECKSUM_TAG:
        raise CorruptFrame("the frame's header does not end with a checksum; send crc32 last")
    _, expected = _CHECKSUM.unpack(header[-_CHECKSUM.size :])
    found = zlib.crc32(payload, zlib.crc32(header[: -_CHECKSUM.size]))
    if found != expected:
        raise CorruptFrame(
            f"a frame of {len(header) + len(payload)} bytes was damaged on its way: its checksum is {found:#010x}, it "
            f"was sent with {expected:#010x}"
        )


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes; a view if it is contiguous."""
    flat = tensor.detach().contiguous().view(-1)
    if flat.numel() == 0:
        return memoryview(b"")
    view: memoryview = flat.view(torch.uint8).numpy().data  # numpy knows no bfloat16
    return view


def _varint(value: int) -> bytes:
    if value <= 0x7F:
        return bytes((value,))
    encoded = bytearray()
    while value > 0x7F:
        encoded.append((value & 0x7F) | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _field(frame: bytes, offset: int, tag: int) -> tuple[int, int]:
    """Start and length of the length-delimited field at `offset`, checked against the frame's size."""
    if offset >= len(frame) or frame[offset] != tag:
        found = f"0x{frame[offset]:02x}" if offset < len(frame) else "its end"
        raise InvalidRequest(f"frame has {found} at byte {offset}, expected tag 0x{tag:02x}")
    length, shift, position = 0, 0, offset + 1
    while True:
        if position >= len(frame) or shift > 35:
            raise InvalidRequest(f"frame has a malformed length at byte {offset + 1}")
        byte = frame[position]
        length |= (byte & 0x7F) << shift
        position += 1
        shift += 7
        if byte < 0x80:
            break
    if position + length > len(frame):
        raise InvalidRequest(
            f"frame is truncated: field at byte {offset} has {length} bytes, {len(frame) - position} are left"
        )
    return position, length
