from protos import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WeightFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WEIGHT_FORMAT_UNSPECIFIED: _ClassVar[WeightFormat]
    WEIGHT_FORMAT_FLOAT32: _ClassVar[WeightFormat]
    WEIGHT_FORMAT_BFLOAT16: _ClassVar[WeightFormat]
    WEIGHT_FORMAT_INT8: _ClassVar[WeightFormat]
    WEIGHT_FORMAT_INT4: _ClassVar[WeightFormat]
    WEIGHT_FORMAT_COMPACT: _ClassVar[WeightFormat]
WEIGHT_FORMAT_UNSPECIFIED: WeightFormat
WEIGHT_FORMAT_FLOAT32: WeightFormat
WEIGHT_FORMAT_BFLOAT16: WeightFormat
WEIGHT_FORMAT_INT8: WeightFormat
WEIGHT_FORMAT_INT4: WeightFormat
WEIGHT_FORMAT_COMPACT: WeightFormat

class ForwardHeader(_message.Message):
    __slots__ = ("sequence_number", "layer_id", "placement_version", "num_rows", "num_assignments", "num_partial_sums", "dtype", "is_cancellation", "timeout_ms", "crc32")
    SEQUENCE_NUMBER_FIELD_NUMBER: _ClassVar[int]
    LAYER_ID_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    NUM_ASSIGNMENTS_FIELD_NUMBER: _ClassVar[int]
    NUM_PARTIAL_SUMS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    IS_CANCELLATION_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    sequence_number: int
    layer_id: int
    placement_version: int
    num_rows: int
    num_assignments: int
    num_partial_sums: int
    dtype: _tensor_pb2.DType
    is_cancellation: bool
    timeout_ms: int
    crc32: int
    def __init__(self, sequence_number: _Optional[int] = ..., layer_id: _Optional[int] = ..., placement_version: _Optional[int] = ..., num_rows: _Optional[int] = ..., num_assignments: _Optional[int] = ..., num_partial_sums: _Optional[int] = ..., dtype: _Optional[_Union[_tensor_pb2.DType, str]] = ..., is_cancellation: _Optional[bool] = ..., timeout_ms: _Optional[int] = ..., crc32: _Optional[int] = ...) -> None: ...

class ForwardRequest(_message.Message):
    __slots__ = ("header", "payload")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    header: ForwardHeader
    payload: bytes
    def __init__(self, header: _Optional[_Union[ForwardHeader, _Mapping]] = ..., payload: _Optional[bytes] = ...) -> None: ...

class ForwardTiming(_message.Message):
    __slots__ = ("queue_ns", "compute_ns")
    QUEUE_NS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_NS_FIELD_NUMBER: _ClassVar[int]
    queue_ns: int
    compute_ns: int
    def __init__(self, queue_ns: _Optional[int] = ..., compute_ns: _Optional[int] = ...) -> None: ...

class ForwardError(_message.Message):
    __slots__ = ("code", "message", "quarantined_unit_ids")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_UNIT_IDS_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    quarantined_unit_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ..., quarantined_unit_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class ForwardResult(_message.Message):
    __slots__ = ("sequence_number", "num_partial_sums", "dtype", "error", "timing", "crc32")
    SEQUENCE_NUMBER_FIELD_NUMBER: _ClassVar[int]
    NUM_PARTIAL_SUMS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    sequence_number: int
    num_partial_sums: int
    dtype: _tensor_pb2.DType
    error: ForwardError
    timing: ForwardTiming
    crc32: int
    def __init__(self, sequence_number: _Optional[int] = ..., num_partial_sums: _Optional[int] = ..., dtype: _Optional[_Union[_tensor_pb2.DType, str]] = ..., error: _Optional[_Union[ForwardError, _Mapping]] = ..., timing: _Optional[_Union[ForwardTiming, _Mapping]] = ..., crc32: _Optional[int] = ...) -> None: ...

class ForwardResponse(_message.Message):
    __slots__ = ("header", "payload")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    header: ForwardResult
    payload: bytes
    def __init__(self, header: _Optional[_Union[ForwardResult, _Mapping]] = ..., payload: _Optional[bytes] = ...) -> None: ...

class CopyExpertRequest(_message.Message):
    __slots__ = ("layer_id", "expert_id")
    LAYER_ID_FIELD_NUMBER: _ClassVar[int]
    EXPERT_ID_FIELD_NUMBER: _ClassVar[int]
    layer_id: int
    expert_id: int
    def __init__(self, layer_id: _Optional[int] = ..., expert_id: _Optional[int] = ...) -> None: ...

class WeightMatrix(_message.Message):
    __slots__ = ("format", "num_outputs", "num_inputs", "group_size", "is_packed", "num_exceptions")
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    NUM_OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    NUM_INPUTS_FIELD_NUMBER: _ClassVar[int]
    GROUP_SIZE_FIELD_NUMBER: _ClassVar[int]
    IS_PACKED_FIELD_NUMBER: _ClassVar[int]
    NUM_EXCEPTIONS_FIELD_NUMBER: _ClassVar[int]
    format: WeightFormat
    num_outputs: int
    num_inputs: int
    group_size: int
    is_packed: bool
    num_exceptions: int
    def __init__(self, format: _Optional[_Union[WeightFormat, str]] = ..., num_outputs: _Optional[int] = ..., num_inputs: _Optional[int] = ..., group_size: _Optional[int] = ..., is_packed: _Optional[bool] = ..., num_exceptions: _Optional[int] = ...) -> None: ...

class CopyExpertHeader(_message.Message):
    __slots__ = ("matrices", "crc32")
    MATRICES_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    matrices: _containers.RepeatedCompositeFieldContainer[WeightMatrix]
    crc32: int
    def __init__(self, matrices: _Optional[_Iterable[_Union[WeightMatrix, _Mapping]]] = ..., crc32: _Optional[int] = ...) -> None: ...

class CopyExpertResponse(_message.Message):
    __slots__ = ("header", "payload")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    header: CopyExpertHeader
    payload: bytes
    def __init__(self, header: _Optional[_Union[CopyExpertHeader, _Mapping]] = ..., payload: _Optional[bytes] = ...) -> None: ...

class GetShardLoadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ShardLayerLoad(_message.Message):
    __slots__ = ("layer_id", "num_tokens")
    LAYER_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    layer_id: int
    num_tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, layer_id: _Optional[int] = ..., num_tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class GetShardLoadResponse(_message.Message):
    __slots__ = ("ep_rank", "num_units", "num_forwards", "num_rows", "num_assignments", "weight_bytes", "layers")
    EP_RANK_FIELD_NUMBER: _ClassVar[int]
    NUM_UNITS_FIELD_NUMBER: _ClassVar[int]
    NUM_FORWARDS_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    NUM_ASSIGNMENTS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    ep_rank: int
    num_units: int
    num_forwards: int
    num_rows: int
    num_assignments: int
    weight_bytes: int
    layers: _containers.RepeatedCompositeFieldContainer[ShardLayerLoad]
    def __init__(self, ep_rank: _Optional[int] = ..., num_units: _Optional[int] = ..., num_forwards: _Optional[int] = ..., num_rows: _Optional[int] = ..., num_assignments: _Optional[int] = ..., weight_bytes: _Optional[int] = ..., layers: _Optional[_Iterable[_Union[ShardLayerLoad, _Mapping]]] = ...) -> None: ...
