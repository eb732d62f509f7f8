from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ProcessState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PROCESS_STATE_UNSPECIFIED: _ClassVar[ProcessState]
    PROCESS_STATE_STARTING: _ClassVar[ProcessState]
    PROCESS_STATE_NEW: _ClassVar[ProcessState]
    PROCESS_STATE_LOADING: _ClassVar[ProcessState]
    PROCESS_STATE_READY: _ClassVar[ProcessState]
    PROCESS_STATE_FAILED: _ClassVar[ProcessState]
    PROCESS_STATE_DOWN: _ClassVar[ProcessState]

class ProcessRole(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PROCESS_ROLE_UNSPECIFIED: _ClassVar[ProcessRole]
    PROCESS_ROLE_SHARD: _ClassVar[ProcessRole]
    PROCESS_ROLE_WORKER: _ClassVar[ProcessRole]
    PROCESS_ROLE_GATEWAY: _ClassVar[ProcessRole]

class RebalanceState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REBALANCE_STATE_UNSPECIFIED: _ClassVar[RebalanceState]
    REBALANCE_STATE_IDLE: _ClassVar[RebalanceState]
    REBALANCE_STATE_STAGING: _ClassVar[RebalanceState]
    REBALANCE_STATE_ACTIVATING: _ClassVar[RebalanceState]
    REBALANCE_STATE_PUBLISHING: _ClassVar[RebalanceState]
    REBALANCE_STATE_DRAINING: _ClassVar[RebalanceState]
    REBALANCE_STATE_RELEASING: _ClassVar[RebalanceState]
PROCESS_STATE_UNSPECIFIED: ProcessState
PROCESS_STATE_STARTING: ProcessState
PROCESS_STATE_NEW: ProcessState
PROCESS_STATE_LOADING: ProcessState
PROCESS_STATE_READY: ProcessState
PROCESS_STATE_FAILED: ProcessState
PROCESS_STATE_DOWN: ProcessState
PROCESS_ROLE_UNSPECIFIED: ProcessRole
PROCESS_ROLE_SHARD: ProcessRole
PROCESS_ROLE_WORKER: ProcessRole
PROCESS_ROLE_GATEWAY: ProcessRole
REBALANCE_STATE_UNSPECIFIED: RebalanceState
REBALANCE_STATE_IDLE: RebalanceState
REBALANCE_STATE_STAGING: RebalanceState
REBALANCE_STATE_ACTIVATING: RebalanceState
REBALANCE_STATE_PUBLISHING: RebalanceState
REBALANCE_STATE_DRAINING: RebalanceState
REBALANCE_STATE_RELEASING: RebalanceState

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ProcessStatus(_message.Message):
    __slots__ = ("name", "state", "address", "pid", "weight_bytes", "detail", "generation", "num_units", "quarantines", "is_leaving", "replaced_generation")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    NUM_UNITS_FIELD_NUMBER: _ClassVar[int]
    QUARANTINES_FIELD_NUMBER: _ClassVar[int]
    IS_LEAVING_FIELD_NUMBER: _ClassVar[int]
    REPLACED_GENERATION_FIELD_NUMBER: _ClassVar[int]
    name: str
    state: ProcessState
    address: str
    pid: int
    weight_bytes: int
    detail: str
    generation: str
    num_units: int
    quarantines: _containers.RepeatedCompositeFieldContainer[Quarantine]
    is_leaving: bool
    replaced_generation: str
    def __init__(self, name: _Optional[str] = ..., state: _Optional[_Union[ProcessState, str]] = ..., address: _Optional[str] = ..., pid: _Optional[int] = ..., weight_bytes: _Optional[int] = ..., detail: _Optional[str] = ..., generation: _Optional[str] = ..., num_units: _Optional[int] = ..., quarantines: _Optional[_Iterable[_Union[Quarantine, _Mapping]]] = ..., is_leaving: _Optional[bool] = ..., replaced_generation: _Optional[str] = ...) -> None: ...

class Quarantine(_message.Message):
    __slots__ = ("ep_rank", "layer_id", "unit_id", "reason")
    EP_RANK_FIELD_NUMBER: _ClassVar[int]
    LAYER_ID_FIELD_NUMBER: _ClassVar[int]
    UNIT_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ep_rank: int
    layer_id: int
    unit_id: int
    reason: str
    def __init__(self, ep_rank: _Optional[int] = ..., layer_id: _Optional[int] = ..., unit_id: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class RebalanceStatus(_message.Message):
    __slots__ = ("state", "target_version", "moved_bytes", "planned_bytes", "num_done", "num_aborted", "last_result", "seconds_since_success", "reason")
    STATE_FIELD_NUMBER: _ClassVar[int]
    TARGET_VERSION_FIELD_NUMBER: _ClassVar[int]
    MOVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PLANNED_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_DONE_FIELD_NUMBER: _ClassVar[int]
    NUM_ABORTED_FIELD_NUMBER: _ClassVar[int]
    LAST_RESULT_FIELD_NUMBER: _ClassVar[int]
    SECONDS_SINCE_SUCCESS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    state: RebalanceState
    target_version: int
    moved_bytes: int
    planned_bytes: int
    num_done: int
    num_aborted: int
    last_result: str
    seconds_since_success: float
    reason: str
    def __init__(self, state: _Optional[_Union[RebalanceState, str]] = ..., target_version: _Optional[int] = ..., moved_bytes: _Optional[int] = ..., planned_bytes: _Optional[int] = ..., num_done: _Optional[int] = ..., num_aborted: _Optional[int] = ..., last_result: _Optional[str] = ..., seconds_since_success: _Optional[float] = ..., reason: _Optional[str] = ...) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("processes", "is_serving", "placement_version", "rebalance")
    PROCESSES_FIELD_NUMBER: _ClassVar[int]
    IS_SERVING_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    REBALANCE_FIELD_NUMBER: _ClassVar[int]
    processes: _containers.RepeatedCompositeFieldContainer[ProcessStatus]
    is_serving: bool
    placement_version: int
    rebalance: RebalanceStatus
    def __init__(self, processes: _Optional[_Iterable[_Union[ProcessStatus, _Mapping]]] = ..., is_serving: _Optional[bool] = ..., placement_version: _Optional[int] = ..., rebalance: _Optional[_Union[RebalanceStatus, _Mapping]] = ...) -> None: ...

class RebalanceRequest(_message.Message):
    __slots__ = ("dry_run",)
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    dry_run: bool
    def __init__(self, dry_run: _Optional[bool] = ...) -> None: ...

class UnitMove(_message.Message):
    __slots__ = ("ep_rank", "layer_id", "unit_id", "num_bytes")
    EP_RANK_FIELD_NUMBER: _ClassVar[int]
    LAYER_ID_FIELD_NUMBER: _ClassVar[int]
    UNIT_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    ep_rank: int
    layer_id: int
    unit_id: int
    num_bytes: int
    def __init__(self, ep_rank: _Optional[int] = ..., layer_id: _Optional[int] = ..., unit_id: _Optional[int] = ..., num_bytes: _Optional[int] = ...) -> None: ...

class RebalanceResponse(_message.Message):
    __slots__ = ("moves", "moved_bytes", "balancedness_before", "balancedness_after", "step_time_ratio", "num_tokens", "reason", "is_worth_it", "started", "old_placement_version", "new_placement_version")
    MOVES_FIELD_NUMBER: _ClassVar[int]
    MOVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    BALANCEDNESS_BEFORE_FIELD_NUMBER: _ClassVar[int]
    BALANCEDNESS_AFTER_FIELD_NUMBER: _ClassVar[int]
    STEP_TIME_RATIO_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    IS_WORTH_IT_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    OLD_PLACEMENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    NEW_PLACEMENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    moves: _containers.RepeatedCompositeFieldContainer[UnitMove]
    moved_bytes: int
    balancedness_before: float
    balancedness_after: float
    step_time_ratio: float
    num_tokens: int
    reason: str
    is_worth_it: bool
    started: bool
    old_placement_version: int
    new_placement_version: int
    def __init__(self, moves: _Optional[_Iterable[_Union[UnitMove, _Mapping]]] = ..., moved_bytes: _Optional[int] = ..., balancedness_before: _Optional[float] = ..., balancedness_after: _Optional[float] = ..., step_time_ratio: _Optional[float] = ..., num_tokens: _Optional[int] = ..., reason: _Optional[str] = ..., is_worth_it: _Optional[bool] = ..., started: _Optional[bool] = ..., old_placement_version: _Optional[int] = ..., new_placement_version: _Optional[int] = ...) -> None: ...

class ScaleShardsRequest(_message.Message):
    __slots__ = ("count",)
    COUNT_FIELD_NUMBER: _ClassVar[int]
    count: int
    def __init__(self, count: _Optional[int] = ...) -> None: ...

class ScaleShardsResponse(_message.Message):
    __slots__ = ("added_ep_ranks", "drained_ep_ranks")
    ADDED_EP_RANKS_FIELD_NUMBER: _ClassVar[int]
    DRAINED_EP_RANKS_FIELD_NUMBER: _ClassVar[int]
    added_ep_ranks: _containers.RepeatedScalarFieldContainer[int]
    drained_ep_ranks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, added_ep_ranks: _Optional[_Iterable[int]] = ..., drained_ep_ranks: _Optional[_Iterable[int]] = ...) -> None: ...

class ScaleWorkersRequest(_message.Message):
    __slots__ = ("count",)
    COUNT_FIELD_NUMBER: _ClassVar[int]
    count: int
    def __init__(self, count: _Optional[int] = ...) -> None: ...

class ScaleWorkersResponse(_message.Message):
    __slots__ = ("added_dp_ranks", "drained_dp_ranks")
    ADDED_DP_RANKS_FIELD_NUMBER: _ClassVar[int]
    DRAINED_DP_RANKS_FIELD_NUMBER: _ClassVar[int]
    added_dp_ranks: _containers.RepeatedScalarFieldContainer[int]
    drained_dp_ranks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, added_dp_ranks: _Optional[_Iterable[int]] = ..., drained_dp_ranks: _Optional[_Iterable[int]] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("role", "rank")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    role: ProcessRole
    rank: int
    def __init__(self, role: _Optional[_Union[ProcessRole, str]] = ..., rank: _Optional[int] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RestartRequest(_message.Message):
    __slots__ = ("role", "rank")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    role: ProcessRole
    rank: int
    def __init__(self, role: _Optional[_Union[ProcessRole, str]] = ..., rank: _Optional[int] = ...) -> None: ...

class RestartResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SampleChoicesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerChoices(_message.Message):
    __slots__ = ("dp_rank", "num_tokens", "topk_ids")
    DP_RANK_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOPK_IDS_FIELD_NUMBER: _ClassVar[int]
    dp_rank: int
    num_tokens: int
    topk_ids: bytes
    def __init__(self, dp_rank: _Optional[int] = ..., num_tokens: _Optional[int] = ..., topk_ids: _Optional[bytes] = ...) -> None: ...

class SampleChoicesResponse(_message.Message):
    __slots__ = ("header_json", "choices")
    HEADER_JSON_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    header_json: bytes
    choices: _containers.RepeatedCompositeFieldContainer[WorkerChoices]
    def __init__(self, header_json: _Optional[bytes] = ..., choices: _Optional[_Iterable[_Union[WorkerChoices, _Mapping]]] = ...) -> None: ...
