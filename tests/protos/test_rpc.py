import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import generation_pb2 as pb
from protos.errors import InvalidRequest
from protos.rpc import parse


def test_a_valid_request_is_read() -> None:
    request = pb.GenerateRequest(text="hello", sampling_params=pb.SamplingParams(top_k=3))
    request.chat.messages.add(role="user", content="hi")
    assert parse(pb.GenerateRequest, request.SerializeToString()) == request


def test_text_that_is_not_utf8_is_the_clients_fault() -> None:
    with pytest.raises(InvalidRequest, match="strings must be UTF-8"):
        parse(pb.GenerateRequest, b"\x12\x02\xff\xfe")


def test_a_field_of_another_version_is_refused_by_its_number_and_place() -> None:
    with pytest.raises(InvalidRequest, match="GenerateRequest has no field number 99"):
        parse(pb.GenerateRequest, b"\x98\x06\x01")
    nested = pb.GenerateRequest(sampling_params=pb.SamplingParams()).SerializeToString()[:-1] + b"\x03\x98\x06\x01"
    with pytest.raises(InvalidRequest, match=r"GenerateRequest\.sampling_params has no field number 99"):
        parse(pb.GenerateRequest, nested)


def test_an_unknown_field_in_one_of_many_messages_is_found() -> None:
    chat = b"\x1a\x07" + b"\x0a\x00" + b"\x0a\x03\x98\x06\x01"  # two messages, the second with field 99
    with pytest.raises(InvalidRequest, match=r"chat\.messages has no field number 99"):
        parse(pb.GenerateRequest, chat)


@given(st.binary(max_size=64))
def test_any_bytes_are_a_request_or_the_clients_fault(data: bytes) -> None:
    with contextlib.suppress(InvalidRequest):
        assert isinstance(parse(pb.GenerateRequest, data), pb.GenerateRequest)
