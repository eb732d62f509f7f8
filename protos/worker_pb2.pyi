from protos import generation_pb2 as _generation_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class RelayedRequest(_message.Message):
    __slots__ = ("request", "request_id", "seed", "output_token_ids", "num_dropped_assignments", "num_degraded_steps")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_DROPPED_ASSIGNMENTS_FIELD_NUMBER: _ClassVar[int]
    NUM_DEGRADED_STEPS_FIELD_NUMBER: _ClassVar[int]
    request: bytes
    request_id: str
    seed: int
    output_token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_dropped_assignments: int
    num_degraded_steps: int
    def __init__(self, request: _Optional[bytes] = ..., request_id: _Optional[str] = ..., seed: _Optional[int] = ..., output_token_ids: _Optional[_Iterable[int]] = ..., num_dropped_assignments: _Optional[int] = ..., num_degraded_steps: _Optional[int] = ...) -> None: ...
