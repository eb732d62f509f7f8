import ctypes
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protos import expert_pb2, tensor_pb2
from protos.codec import decode_frame, dtype_from_wire, dtype_to_wire, join_frame, write_frame
from protos.errors import CorruptFrame, InvalidRequest
from tests.frames import encode_frame
from tests.payload_reader import PayloadReader

DTYPES = [torch.float32, torch.bfloat16, torch.int32, torch.int64]
shapes = st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple)
tensors = st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), max_size=4)
headers = st.builds(
    expert_pb2.ForwardHeader,
    sequence_number=st.integers(0, 2**64 - 1),
    layer_id=st.integers(0, 2**32 - 1),
    num_rows=st.integers(0, 2**32 - 1),
)


def random_tensors(specs) -> list[torch.Tensor]:
    return [torch.randint(-100, 100, shape).to(dtype) for shape, dtype in specs]


@given(header=headers, specs=tensors)
def test_a_frame_is_read_as_it_was_written(header, specs):
    written = random_tensors(specs)
    read_header, payload = decode_frame(expert_pb2.ForwardHeader, encode_frame(header, written))
    assert read_header.HasField("crc32")
    read_header.ClearField("crc32")
    assert read_header == header
    reader = PayloadReader(payload)
    for tensor in written:
        read = reader.take(tuple(tensor.shape), tensor.dtype)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)
    reader.finish()


@given(header=headers, payload=st.one_of(st.binary(max_size=300), st.just(bytes(range(256)) * 70)))
def test_a_payload_that_is_written_in_place_gives_the_same_frame(header, payload):
    serialised = header.SerializeToString()
    frame = write_frame(serialised, len(payload), lambda address: ctypes.memmove(address, payload, len(payload)))
    assert type(frame) is bytes
    assert frame == join_frame(serialised, [memoryview(payload)])


@given(header=headers, specs=tensors)
def test_a_frame_is_a_valid_protobuf_message(header, specs):
    written = random_tensors(specs)
    frame = encode_frame(header, written)
    message = expert_pb2.ForwardRequest.FromString(frame)
    message.header.ClearField("crc32")
    assert message.header == header
    assert message.payload == b"".join(bytes(tensor.view(torch.uint8).numpy().tobytes())
                                       if tensor.numel() else b"" for tensor in written)  # fmt: skip


@given(header=headers, specs=tensors)
def test_a_frame_written_by_protobuf_is_read_if_it_has_its_checksum(header, specs):
    payload = b"".join(bytes(tensor.view(torch.uint8).numpy().tobytes()) if tensor.numel() else b""
                       for tensor in random_tensors(specs))  # fmt: skip
    message = expert_pb2.ForwardRequest(header=header, payload=payload)
    with pytest.raises(CorruptFrame, match="does not end with a checksum"):
        decode_frame(expert_pb2.ForwardHeader, message.SerializeToString())
    message.header.crc32 = zlib.crc32(payload, zlib.crc32(header.SerializeToString()))
    read_header, read_payload = decode_frame(expert_pb2.ForwardHeader, message.SerializeToString())
    read_header.ClearField("crc32")
    assert read_header == header
    assert bytes(read_payload) == payload


@given(header=headers, specs=tensors, place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_one_flipped_bit_is_noticed(header, specs, place, bit):
    frame = bytearray(encode_frame(header, random_tensors(specs)))
    frame[place % len(frame)] ^= 1 << bit
    with pytest.raises(InvalidRequest):
        decode_frame(expert_pb2.ForwardHeader, bytes(frame))


def test_a_header_larger_than_any_is_refused_before_it_is_parsed():
    frame = b"\x0a\x81\x80\x04" + bytes(65537)
    with pytest.raises(InvalidRequest, match="header has 65537 bytes, limit is 65536"):
        decode_frame(expert_pb2.ForwardHeader, frame)


@given(st.binary(max_size=64))
def test_hostile_bytes_raise_invalid_request_and_nothing_else(data):
    try:
        _, payload = decode_frame(expert_pb2.ForwardHeader, data)
        PayloadReader(payload).take((3, 4), torch.float32)
    except InvalidRequest:
        pass


@given(header=headers, specs=tensors, data=st.data())
def test_a_truncated_frame_is_refused_unless_its_end_is_a_fields_end(header, specs, data):
    frame = encode_frame(header, random_tensors(specs))
    cut = data.draw(st.integers(0, len(frame) - 1))
    try:
        _, payload = decode_frame(expert_pb2.ForwardHeader, frame[:cut])
    except InvalidRequest:
        return
    assert len(payload) == 0  # only the header was left, whole


def test_bytes_after_the_payload_are_refused():
    with pytest.raises(InvalidRequest, match="1 bytes after its payload"):
        decode_frame(expert_pb2.ForwardHeader, encode_frame(expert_pb2.ForwardHeader(), []) + b"\x00")


def test_a_length_that_never_ends_is_refused():
    with pytest.raises(InvalidRequest, match="malformed length"):
        decode_frame(expert_pb2.ForwardHeader, b"\x0a" + b"\xff" * 20)


def test_dtypes_have_wire_names_and_unknown_ones_are_refused():
    assert dtype_from_wire(dtype_to_wire(torch.bfloat16)) == torch.bfloat16
    for wire in (tensor_pb2.DTYPE_UNSPECIFIED, 99):
        with pytest.raises(InvalidRequest, match="is not one of"):
            dtype_from_wire(wire)


def test_a_slice_is_written_as_its_elements_not_as_its_storage():
    tensor = torch.arange(12, dtype=torch.int32).view(3, 4)[:, 1:3]
    _, payload = decode_frame(expert_pb2.ForwardHeader, encode_frame(expert_pb2.ForwardHeader(), [tensor]))
    assert torch.equal(PayloadReader(payload).take((3, 2), torch.int32), tensor)
