"""The one configuration file: composes the settings of every part and refuses what it does not know.

A default is written once, here or above the class that reads it. Errors name the key's path, the value and the limit.
"""

import reprlib
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from attention.engine_config import EngineConfig, Gib
from attention.mla_form import MlaForm
from cluster.fixed_ports import check_different_ports, fixed_ports
from cluster.host_port import host_and_port
from cluster.yaml_file import read_yaml
from protos.bounded_file import why_unreadable
from router.placement.members import ShardTraits
from router.router_config import PositiveSeconds, RouterConfig, Seconds

MAX_COUNT = 4096  # processes of a role
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Port = Annotated[int, Field(ge=0, le=65535)]
Mib = Annotated[float, Field(gt=0, le=2**30)]
FixedPort = Annotated[int, Field(ge=1, le=65535)]

BUNDLED_MODEL = "bundled"
RAY_AUTO, RAY_LOCAL, RAY_CLIENT = "auto", "local", "ray://"  # as ray.init has them
MAX_FAULTS = 50  # that are told of one


class ConfigError(Exception):
    """The configuration cannot be used; the message lists every fault with its path."""


class DTypeName(StrEnum):
    """Element type of weights and activations."""

    AUTO = "auto"  # as the checkpoint says; float32 for the bundled model
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class PlacementStrategy(StrEnum):
    """How Ray lays a group of actors over nodes."""

    PACK = "PACK"
    SPREAD = "SPREAD"
    STRICT_SPREAD = "STRICT_SPREAD"


class PlacementPolicy(StrEnum):
    """Which units there are, where they live and which get replicas; see router/placement."""

    STATIC = "static"  # units in turn, from the model's shape alone
    DEVICE_LIMITED = "device_limited"  # whole expert groups, by load; contiguous sets where the model has no groups
    COACTIVATION = "coactivation"  # for models without groups: experts that fire together, by load
    EPLB = "eplb"  # single experts, by load; a token may visit a shard for each of its experts


class StrictModel(BaseModel, frozen=True, strict=True, extra="forbid", allow_inf_nan=False):
    """Unknown keys, wrong types and numbers that are not finite are errors; nothing changes after reading."""


class ActorConfig(StrictModel):
    """What one kind of process asks of Ray and of the machine."""

    num_cpus: Annotated[float, Field(ge=0, le=1024)] = 1.0  # Ray's booking, not a limit
    num_gpus: Annotated[float, Field(ge=0, le=64)] = 0.0
    num_threads: Annotated[int, Field(ge=1, le=256)] | None = None  # that compute; unset: a share of the cores
    strategy: PlacementStrategy = Field(default=PlacementStrategy.PACK, strict=False)
    labels: dict[str, str] = Field(default_factory=dict)  # Ray node labels that the actors' nodes must carry
    port: Port = 0  # of the gRPC server; 0 takes a free one. A fixed one, for probes, wants a node for each process
    metrics_port: Port = 0  # Prometheus endpoint; the same holds
    health_port: FixedPort | None = None  # health alone, in plaintext: for probes that speak no TLS; unset: none


class ScalingConfig(StrictModel):
    """How the number of processes of a role follows their load. On a cluster of others Ray's autoscaler gets nodes."""

    enabled: bool = False
    min_count: Count = 1
    max_count: Count = 16
    target_usage_ratio: Annotated[float, Field(gt=0, le=1)] = 0.7  # of what a process has; beyond, there are too few
    up_window_s: Seconds = 30.0  # more must be wanted for so long; a burst passes by itself
    down_window_s: Seconds = 600.0  # fewer; longer than pauses: coming back costs time

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        if self.min_count > self.max_count:
            raise ValueError(f"min_count is {self.min_count}, more than max_count, {self.max_count}")
        return self


class WorkerScalingConfig(ScalingConfig):
    """Usage: what is taken of a worker's latent cache, or of the sequences of a step, whichever is fuller; the mean."""

    target_queue_ratio: Annotated[float, Field(gt=0, le=1024)] = 0.1  # that wait, wherever, for each computed one


class AttentionWorkersConfig(ActorConfig):
    """The attention workers, `dp_rank` 0 to count - 1; `mobula scale workers` changes their number later."""

    count: Count = 2
    device: str = "cpu"
    # "by_position" computes prompt tokens in the naive form and generated ones in the absorbed one; in the CPU kernels
    # a request's bits then do not depend on what else is in a step. "absorbed" and "naive" take one form for all.
    mla_form: MlaForm = Field(default=MlaForm.BY_POSITION, strict=False)
    num_micro_batches: Annotated[int, Field(ge=1, le=8)] | None = None  # of a step, for ping-pong; unset: as measured
    engine: EngineConfig = Field(default_factory=EngineConfig)
    router: RouterConfig = Field(default_factory=RouterConfig)
    autoscaling: WorkerScalingConfig = Field(default_factory=WorkerScalingConfig)


class ShardScalingConfig(ScalingConfig):
    """Usage: the share of time that the busiest shard computes, f' times the mean of all."""

    target_queue_s: PositiveSeconds = 0.02  # that a forward waits for the compute thread, on the average


class RebalancingConfig(StrictModel):
    """How experts move while requests run. `mobula rebalance` does so on demand, whatever `enabled` says."""

    enabled: bool = False  # by itself, when it is worth it
    half_life_s: PositiveSeconds = 60.0  # of the load: an assignment counts half after this
    # A shard that was ready and is gone for so long has its units given to the others, and gets units again when it is
    # back. Longer than a restart takes: that reads them too. null: others never take over.
    lost_after_s: PositiveSeconds | None = 60.0
    min_gain: Annotated[float, Field(ge=0, le=1)] = 0.05  # of the experts' expected time, for a move to be worth it
    min_interval_s: Seconds = 300.0  # between two by itself
    min_assignments: Annotated[int, Field(ge=0)] = 10_000  # that the load must count
    max_mib_per_s: Mib = 32.0  # that a shard reads meanwhile; on CPUs more is felt
    copy_from_peers: bool = True  # units that another shard has; false reads all of them from the checkpoint


class ShardGroupConfig(StrictModel):
    """Some shards that are alike and differ from the others. What is unset is as in expert_shards."""

    count: Count
    max_weight_gib: Gib | None = None  # of each
    speed: Annotated[float, Field(gt=0, le=1e6)] | None = None  # relative to a shard of speed 1; unset: as measured
    num_cpus: Annotated[float, Field(ge=0, le=1024)] | None = None
    num_gpus: Annotated[float, Field(ge=0, le=64)] | None = None
    labels: dict[str, str] | None = None


class ExpertShardsConfig(ActorConfig):
    """The expert shards, `ep_rank` 0 to count - 1; `mobula scale shards` changes their number later."""

    count: Count = 4
    # The first shards in order, where they differ; load is shared accordingly. Not strict: YAML has lists, no tuples.
    groups: tuple[ShardGroupConfig, ...] = Field(default=(), strict=False)
    device: str = "cpu"
    max_weight_gib: Gib | None = None  # per shard; unset: what the machine has free
    placement_policy: PlacementPolicy = Field(default=PlacementPolicy.DEVICE_LIMITED, strict=False)
    num_replicas: Count = 1  # the least number of shards that hold each placement unit
    failure_domain_label: str | None = None  # Ray node label, such as a zone: replicas lie in two; unset: on two nodes
    redundancy: Annotated[float, Field(ge=0, le=64)] = 0.0  # replicas beyond, as a share of the units: 0.25 a quarter
    units_per_layer: Count | None = None  # for models without expert groups; unset: up to 8 contiguous sets
    max_waiting_forwards: Annotated[int, Field(ge=1)] = 1024  # per shard; more are refused, not queued
    max_waiting_mib: Annotated[int, Field(ge=1)] = 1024  # of frames that wait, per shard; the same
    self_check_interval_s: PositiveSeconds | None = 0.25  # between two experts' checks; null: none
    rebalancing: RebalancingConfig = Field(default_factory=RebalancingConfig)
    autoscaling: ShardScalingConfig = Field(default_factory=ShardScalingConfig)

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        if (num_grouped := sum(group.count for group in self.groups)) > self.count:
            raise ValueError(f"groups have {num_grouped} shards, count is {self.count}; raise count")
        return self

    @model_validator(mode="after")
    def _check_replicas(self) -> Self:
        if self.num_replicas > self.count:
            raise ValueError(
                f"num_replicas is {self.num_replicas}, count is {self.count}: a shard holds a unit once; raise count "
                "or lower num_replicas"
            )
        return self

    def group_of(self, ep_rank: int) -> ShardGroupConfig | None:
        """The group that a shard belongs to, if any."""
        ranks = [group for group in self.groups for _ in range(group.count)]
        return ranks[ep_rank] if ep_rank < len(ranks) else None

    def actor_config(self, ep_rank: int) -> ActorConfig:
        """What a shard asks of Ray."""
        group = self.group_of(ep_rank)
        own = group.model_dump(include={"num_cpus", "num_gpus", "labels"}, exclude_none=True) if group else {}
        return self.model_copy(update=own)

    def traits(self, ep_rank: int) -> ShardTraits:
        """What placement must know of a shard."""
        group = self.group_of(ep_rank)
        gib = group.max_weight_gib if group and group.max_weight_gib else self.max_weight_gib
        return ShardTraits(max_weight_bytes=int(gib * 2**30) if gib else None, speed=group.speed if group else None)


class ControllerConfig(StrictModel):
    """Who keeps the system together."""

    labels: dict[str, str] = Field(default_factory=dict)  # Ray node labels that its node must carry
    port: Port = 0  # of the admin calls, which the gateway relays; 0 takes a free one
    metrics_port: Port = 0  # Prometheus endpoint with the balance of load; 0 takes a free one
    expert_series: bool = False  # one more series for each (layer, expert): 9,440 for DeepSeek-V2


class AdmissionConfig(StrictModel):
    """Who waits at a gateway, and who is told to come back later."""

    max_wait_s: PositiveSeconds = 10.0  # who is expected to wait longer gets RESOURCE_EXHAUSTED at once
    max_request_mib: Mib = 256.0  # of all requests that wait or are computed, in memory
    # One client is one key, or one address where no keys are wanted. Each gateway counts for itself.
    max_requests_per_client: Annotated[int, Field(ge=1)] | None = None  # in flight; unset: no limit but fairness
    max_tokens_per_s_per_client: Annotated[float, Field(gt=0, le=1e12)] | None = None  # both ways; unset: no limit


class GatewayConfig(StrictModel):
    """The front door."""

    count: Annotated[int, Field(ge=1, le=64)] = 1  # those on one machine share `port`; each has its own calls
    host: str = "127.0.0.1"  # "0.0.0.0" to be reachable from other machines
    port: Port = 50051  # 0 takes a free one
    health_port: FixedPort | None = None  # health alone, in plaintext: for probes that speak no TLS; unset: none
    metrics_port: Port = 9400  # HTTP: the dashboard, /metrics (gateway 0: of every process); 0 takes a free one
    dashboard: bool = (
        True  # a page at http://host:metrics_port/ that shows load, placement and health; needs no Grafana
    )
    max_concurrent_requests: Annotated[int, Field(ge=1)] = 1024  # over all workers; more get RESOURCE_EXHAUSTED
    admission: AdmissionConfig = Field(default_factory=AdmissionConfig)
    resume_timeout_s: Seconds = 60.0  # an answer that has begun waits so long for another worker
    # A worker that is asked whether it is there and says nothing for so long, and for longer than is usual for it, has
    # its calls handed to another one, though its connection stands. A busy machine may leave it without a core so long.
    # At most as long as a silent connection is kept.
    silence_timeout_s: Annotated[float, Field(ge=0.1, le=5.0)] = 0.5
    read_timeout_s: PositiveSeconds = 30.0  # a client that takes nothing for so long is cut off
    http_key: bool = False  # the HTTP port wants a key with the right `admin`: Bearer, or the password of Basic
    keys: str | None = None  # file of bearer keys, see `mobula keys`; unset: whoever reaches the port may do everything
    labels: dict[str, str] = Field(default_factory=dict)  # Ray node labels that its node must carry

    @model_validator(mode="after")
    def _check_key(self) -> Self:
        if self.http_key and not self.keys:
            raise ValueError("http_key needs `keys`")
        return self


class TlsConfig(StrictModel):
    """Certificates, read again when their files change. `mobula certs make` and cert-manager write such folders."""

    processes: str | None = None  # holds a folder for each ROLE: mTLS between processes; unset: plaintext
    clients: str | None = None  # the certificate that clients see: TLS on the gateway's port; unset: plaintext
    require_client_certificate: bool = False  # of an authority in the ca.crt of `clients`

    metrics: bool = False  # HTTP ports too: of processes with their own, of the gateway with that of `clients`

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.require_client_certificate and not self.clients:
            raise ValueError("require_client_certificate needs `clients`")
        if self.metrics and not (self.processes and self.clients):
            raise ValueError("metrics needs `processes` and `clients`")
        return self


class MetricsConfig(StrictModel):
    """Further Prometheus series."""

    vllm_names: bool = False  # workers' request series also as vllm:..., for boards and pickers that know those


class LogLevel(StrEnum):
    """The least that is written."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LoggingConfig(StrictModel):
    """What processes write to stderr, which Ray keeps in its folder of logs."""

    json_lines: bool = False  # a JSON object a line, with process, placement version and request, for log collectors
    level: LogLevel = Field(default=LogLevel.WARNING, strict=False)


class TracingConfig(StrictModel):
    """Spans of requests, for OpenTelemetry. Wants the extra `tracing`."""

    endpoint: str | None = None  # host:port of an OTLP collector, gRPC in plaintext; unset: no tracing
    sample_ratio: Annotated[float, Field(ge=0, le=1)] = 0.01  # of requests that come without a traceparent


class RayConfig(StrictModel):
    """Which Ray cluster to run on."""

    # HOST:PORT; "auto" for the cluster of this machine; unset or "local": start one and stop it at the end
    address: str | None = None
    namespace: str = "mobula"
    start_timeout_s: PositiveSeconds = 600.0  # until every process is ready; large checkpoints need more

    @field_validator("address")
    @classmethod
    def _check_address(cls, address: str | None) -> str | None:
        if address not in (None, RAY_AUTO, RAY_LOCAL) and ray_host_and_port(address) is None:
            raise ValueError(
                f"must be auto, HOST:PORT or ray://HOST:PORT, got {reprlib.repr(address)}; leave it out to start a "
                "cluster on this machine, or give a PORT of 1 to 65535"
            )
        return None if address == RAY_LOCAL else address


class MobulaConfig(StrictModel):
    """Everything `mobula serve` needs to know."""

    model: Annotated[str, Field(min_length=1)] = BUNDLED_MODEL  # a folder, a Hugging Face id, or "bundled"
    revision: str | None = None  # of a Hugging Face id
    dtype: DTypeName = Field(default=DTypeName.AUTO, strict=False)
    attention_workers: AttentionWorkersConfig = Field(default_factory=AttentionWorkersConfig)
    expert_shards: ExpertShardsConfig = Field(default_factory=ExpertShardsConfig)
    gateway: GatewayConfig = Field(default_factory=GatewayConfig)
    controller: ControllerConfig = Field(default_factory=ControllerConfig)
    tls: TlsConfig = Field(default_factory=TlsConfig)
    ray: RayConfig = Field(default_factory=RayConfig)
    metrics: MetricsConfig = Field(default_factory=MetricsConfig)
    tracing: TracingConfig = Field(default_factory=TracingConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    drain_timeout_s: Seconds = 30.0  # at shutdown, for requests in flight
    leave_file: str | None = None  # on a node that has it, processes hand over what they do: `mobula leave` writes it

    @model_validator(mode="after")
    def _check_ports(self) -> Self:
        for name, role in (("attention_workers", self.attention_workers), ("expert_shards", self.expert_shards)):
            has_own_nodes = role.count == 1 or role.strategy is PlacementStrategy.STRICT_SPREAD
            fixed = fixed_ports(name, role)
            if fixed and not has_own_nodes:
                raise ValueError(
                    f"{name} has fixed ports {fixed}, but {role.count} processes may share a node (strategy "
                    f"{role.strategy}); leave them out, or set strategy STRICT_SPREAD"
                )
        return self

    @model_validator(mode="after")
    def _check_different_ports(self) -> Self:
        parts = ("attention_workers", "expert_shards", "controller", "gateway")
        check_different_ports({name: getattr(self, name) for name in parts}, is_one_machine=self.ray.address is None)
        return self


def ray_host_and_port(address: str) -> tuple[str, int] | None:
    """Of a Ray cluster, or of its server for clients; None for what is none."""
    return host_and_port(address.removeprefix(RAY_CLIENT))


def parse_config(data: Any) -> MobulaConfig:
    """The configuration in a mapping as YAML gives it. Raises ConfigError with the path of each fault."""
    if data is None:
        return MobulaConfig()
    try:
        return MobulaConfig.model_validate(data)
    except ValidationError as error:
        faults = error.errors()
        more = [f"and {len(faults) - MAX_FAULTS} more"] if len(faults) > MAX_FAULTS else []
        raise ConfigError("\n".join([*map(_describe, faults[:MAX_FAULTS]), *more])) from error


def read_config(path: Path) -> MobulaConfig:
    """The configuration in a YAML file. Raises ConfigError naming the file."""
    try:
        data = read_yaml(path)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {why_unreadable(error)}") from error
    try:
        return parse_config(data)
    except ConfigError as error:
        raise ConfigError(f"{path}:\n{error}") from error


def _describe(fault: Any) -> str:
    path = ".".join(str(part) for part in fault["loc"]) or "the document"
    if fault["type"] == "value_error" and not fault["loc"]:  # of our own checks, which name the keys
        return str(fault["ctx"]["error"])
    if fault["type"] == "extra_forbidden":
        return f"{path}: unknown key"
    if fault["type"] == "value_error":
        return f"{path}: {fault['ctx']['error']}"
    if fault["type"] == "model_type":
        return f"{path}: must be a mapping of keys to values, got {reprlib.repr(fault['input'])}"
    if fault["type"] == "tuple_type":
        return f"{path}: must be a list, got {reprlib.repr(fault['input'])}"
    is_text = fault["type"] in ("int_type", "float_type") and isinstance(fault["input"], str)
    way_out = ", which is text: a number has no quotes, and as YAML has it 1e3 is 1.0e+3" if is_text else ""
    return f"{path}: {fault['msg'][0].lower()}{fault['msg'][1:]}, got {reprlib.repr(fault['input'])}{way_out}"
