from protos import generation_pb2 as _generation_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class RelayedRequest(_message.Message):
    __slots__ = ("request", "request_id", "seed", "output_token_ids")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    request: bytes
    request_id: str
    seed: int
    output_token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, request: _Optional[bytes] = ..., request_id: _Optional[str] = ..., seed: _Optional[int] = ..., output_token_ids: _Optional[_Iterable[int]] = ...) -> None: ...
