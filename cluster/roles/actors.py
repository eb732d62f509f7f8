"""The only place where plain classes become Ray actors. Ray starts, places, restarts and calls processes; no token
passes through it.
"""

import logging
import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray
from prometheus_client import CollectorRegistry, make_wsgi_app
from ray.exceptions import RayActorError, RayTaskError
from ray.util import get_placement_group, list_named_actors, remove_placement_group
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.config import ActorConfig, MobulaConfig
from cluster.controller.admin_server import AdminServer
from cluster.controller.balance import Proposer
from cluster.controller.controller import Controller, StartError
from cluster.controller.lease import Lease
from cluster.controller.memory_budget import MemoryBudget
from cluster.controller.metrics import ControllerMetrics
from cluster.controller.process import ClusterStatus, ManagedProcess, ProcessDied, RoleName
from cluster.controller.rebalance import Float64Array
from cluster.gateway.http_server import serve_http
from cluster.logs import log_to_stderr
from cluster.roles.role import node_address
from cluster.roles.role_actor import GatewayActor, RoleActor, ShardActor, WorkerActor
from cluster.security.http_tls import PROCESS_READERS, secured_connections
from cluster.security.metrics import CertificateMetrics
from cluster.security.process_tls import process_credentials, process_folder
from protos.certificates import CertificateFolder
from protos.credentials import PeerRole
from protos.errors import Unavailable
from protos.loop_thread import LoopEnded
from router.expert_map import ExpertMap
from router.placement import PlacementRequest
from router.placement.members import ShardTraits, place_on

logger = logging.getLogger(__name__)

PLACEMENT_TIMEOUT_S = 60.0  # for Ray to find room on a cluster of ours
NAME_PREFIX = "mobula-"  # of every actor
CONTROL_CPUS = 0.1  # booked for the controller and for the gateway
NICENESS = 5  # of the controller: a placement is computed beside requests that run on the same cores
FAILED_END_S = 10.0  # for who waits for the controller's start to be told why it failed, and to end everything
ACTOR_THREADS = 4  # so that health is answered while weights are read
START_GROUP = "start"  # threads of its own: who waits in it must not keep the owner, whose calls are its lease, waiting
ACTOR_CLASSES: Mapping[RoleName, type[RoleActor]] = {
    RoleName.SHARD: ShardActor,
    RoleName.WORKER: WorkerActor,
    RoleName.GATEWAY: GatewayActor,
}


class RayProcess:
    """A process that is a Ray actor."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def call(self, method: str, *args: Any) -> Future[Any]:
        answer: Future[Any] = Future()
        try:
            reference = self._actor.call.remote(method, *args)
        except RayActorError as error:
            answer.set_exception(ProcessDied(str(error)))
            return answer
        reference.future().add_done_callback(lambda done: _settle(answer, done))
        return answer

    def restart(self) -> None:
        ray.kill(self._actor, no_restart=False)

    def kill(self) -> None:
        ray.kill(self._actor, no_restart=True)


class ControllerActor:
    """The controller. The other actors live without it: Ray starts it again when it dies, and it finds them by name."""

    def __init__(
        self,
        owner: str,
        config: MobulaConfig,
        expert_map: ExpertMap,
        request: PlacementRequest,
        host: str | None,
        memory_budget: MemoryBudget | None,
    ) -> None:
        """owner: who may stop the system. The rest as in create_controller."""
        os.nice(NICENESS)
        self._config = config
        self._expert_map = expert_map
        self._request = request
        self._host = host
        self._memory_budget = memory_budget
        self._controller: Controller | None = None
        self._admin: AdminServer | None = None
        log_to_stderr(config.logging, "controller", self._placement_version)
        self._creator = owner
        self._lease = Lease(owner)
        # Not in a call: nobody would make it when Ray starts this actor again.
        self._starting = ThreadPoolExecutor(max_workers=1, thread_name_prefix="start").submit(self._start_or_end)

    def _placement_version(self) -> int | None:
        return self._controller.status().placement_version if self._controller else None

    @ray.method(concurrency_group=START_GROUP)
    def start(self, owner: str, config: MobulaConfig) -> bool:
        """Waits until every actor is created or found. Whether the system is the caller's own and not taken over.

        Raises StartError when the Ray cluster has no room, and when this controller serves another configuration or
        obeys another owner.
        """
        if config != self._config:
            raise StartError(
                f"a Mobula with another configuration serves in namespace {config.ray.namespace}; set ray.namespace, "
                "or stop that one first"
            )
        if not self._lease.take(owner):
            raise StartError(f"another process serves Mobula in namespace {config.ray.namespace}; set ray.namespace")
        self._starting.result()
        return owner == self._creator

    def _start_or_end(self) -> None:
        """Where it could not start, whoever waits is told; then the process ends, and Ray starts it again."""
        try:
            self._start()
        except Exception:
            logger.exception("the controller could not start; its process ends in %g s", FAILED_END_S)
            end = threading.Timer(FAILED_END_S, _end_process)
            end.daemon, end.name = True, "failed-end"
            end.start()
            raise

    def _start(self) -> None:
        self._controller = Controller(
            _create_processes(self._config, self._host),
            self._expert_map,
            _proposer(self._config, self._request),
            self._config.expert_shards.rebalancing,
            self._create_process,
            self._config.drain_timeout_s,
            self._config.expert_shards.autoscaling,
            self._config.attention_workers.autoscaling,
            self._memory_budget,
        )
        certificates = process_folder(self._config.tls, PeerRole.CONTROLLER)
        self._admin = AdminServer(self._controller, process_credentials(certificates))
        host, own = self._host or node_address(), self._config.controller
        self._controller.admin_address = self._admin.start(host, own.port)
        self._controller.metrics_address = f"{host}:{self._serve_metrics(host, self._controller, certificates)}"
        self._controller.start()

    def _serve_metrics(self, host: str, controller: Controller, certificates: CertificateFolder | None) -> int:
        """The port."""
        registry = CollectorRegistry()
        ControllerMetrics(
            registry,
            gate=self._request.gate,
            status=controller.status,
            traffic=controller.traffic,
            num_rebalances=controller.num_rebalances,
            has_expert_series=self._config.controller.expert_series,
        )
        secure = None
        if certificates:
            CertificateMetrics(registry, "controller").watch(PeerRole.CONTROLLER.value, certificates)
            if self._config.tls.metrics:
                secure = secured_connections(certificates, is_mutual=True, readers=PROCESS_READERS)
        _, port = serve_http(host, self._config.controller.metrics_port, make_wsgi_app(registry), secure)
        return port

    def _create_process(self, role: RoleName, rank: int) -> ManagedProcess:
        """One more. Ray starts it when it has room; an autoscaler makes some. Raises Unavailable."""
        actors = _actors(self._config, role)
        if rank < len(actors):  # its bundle is free since the one before it has left
            group = get_placement_group(_group_name(role, self._config.ray.namespace))
            options = _in_group(actors[rank], group, rank)
        else:
            options = _unbooked_options(self._config, role, rank)
        try:
            return _create_process(role, rank, options, self._config, self._host)
        except ValueError as error:  # Ray's word for a name that is taken
            raise Unavailable(f"{role} {rank} is still ending: {error}; ask again", retry_after_s=1.0) from error

    def status(self, owner: str) -> ClusterStatus | None:
        """None until the actors are created. Tells the controller that its owner is there."""
        self._lease.renew(owner)
        return self._controller.status() if self._controller else None

    def stop(self, owner: str, drain_timeout_s: float) -> bool:
        """Ends every process, gateways first. False, and nothing happens, for whom the controller does not obey."""
        if not self._lease.is_held_by(owner):
            return False
        if self._admin:
            self._admin.stop()
        if self._controller:
            self._controller.stop(drain_timeout_s)
        return True


def create_controller(
    owner: str,
    config: MobulaConfig,
    expert_map: ExpertMap,
    request: PlacementRequest,
    host: str | None,
    memory_budget: MemoryBudget | None,
) -> Any:
    """The controller actor, the one that is there already if one is.

    request: what later placements keep to; host: where servers listen, None for each node's own address. memory_budget:
    where all processes run on this machine.
    """
    options = _options(ActorConfig(num_cpus=CONTROL_CPUS)) | {
        "name": f"{NAME_PREFIX}controller",
        "namespace": config.ray.namespace,
        "get_if_exists": True,
        "label_selector": config.controller.labels or None,
    }
    groups = {START_GROUP: ACTOR_THREADS}
    actor_class = ray.remote(concurrency_groups=groups)(ControllerActor)  # type: ignore[call-overload]  # Ray's types
    return actor_class.options(**options).remote(owner, config, expert_map, request, host, memory_budget)


def end_everything(namespace: str) -> None:
    """Ends at once whatever is left of the system: actors, controller first, and what they had booked."""
    names = [actor["name"] for actor in list_named_actors(all_namespaces=True) if actor["namespace"] == namespace]
    for name in sorted(name for name in names if name.startswith(NAME_PREFIX)):  # "controller" sorts first
        with suppress(ValueError):  # it has ended meanwhile
            ray.kill(ray.get_actor(name, namespace), no_restart=True)
    for role in (RoleName.SHARD, RoleName.WORKER):
        with suppress(ValueError):  # it was not placed
            remove_placement_group(get_placement_group(_group_name(role, namespace)))


def _proposer(config: MobulaConfig, request: PlacementRequest) -> Proposer:
    policy = config.expert_shards.placement_policy.value

    def place(
        load: Float64Array, current: ExpertMap, placement_version: int, shards: Mapping[int, ShardTraits]
    ) -> ExpertMap:
        return place_on(replace(request, load=load, current=current), shards, placement_version, policy)

    shards = config.expert_shards
    return Proposer(place, request.expert_bytes, shards.traits, needs_domains=shards.num_replicas > 1)


def booked_cpus(config: MobulaConfig) -> float:
    """CPUs that the system books with Ray."""
    return sum(actor.num_cpus for actor in [*_actors(config, RoleName.SHARD), *_actors(config, RoleName.WORKER)]) + (
        (1 + config.gateway.count) * CONTROL_CPUS
    )


def _actors(config: MobulaConfig, role: RoleName) -> list[ActorConfig]:
    """What each process of a role asks of Ray, by rank."""
    if role is RoleName.WORKER:
        return [config.attention_workers] * config.attention_workers.count
    return [config.expert_shards.actor_config(ep_rank) for ep_rank in range(config.expert_shards.count)]


def _create_processes(config: MobulaConfig, host: str | None) -> list[ManagedProcess]:
    processes = []
    found = _found_ranks(config.ray.namespace)
    for role in (RoleName.SHARD, RoleName.WORKER):
        actors = _actors(config, role)
        group = _place(role, actors, config)
        # Both come and go. Shards are created before workers, these before gateways: those found beside one of the next
        # role are all there are.
        are_all_found = found[RoleName.WORKER if role is RoleName.SHARD else RoleName.GATEWAY]
        for rank in found[role] if are_all_found else range(len(actors)):
            options = (
                _in_group(actors[rank], group, rank) if rank < len(actors) else _unbooked_options(config, role, rank)
            )
            options["get_if_exists"] = True
            processes.append(_create_process(role, rank, options, config, host))
            # One that was added and has not come yet is waited for by nobody, whoever asked for it.
            processes[-1].is_joining = role is RoleName.WORKER and bool(are_all_found) and rank >= len(actors)
    labels = {"label_selector": config.gateway.labels or None}
    options = _options(ActorConfig(num_cpus=CONTROL_CPUS)) | labels | {"get_if_exists": True}
    if config.gateway.count > 1:
        options["scheduling_strategy"] = "SPREAD"  # a node that is lost should not take all of them along
    processes += [
        _create_process(RoleName.GATEWAY, rank, options, config, host) for rank in range(config.gateway.count)
    ]
    return processes


def _create_process(
    role: RoleName, rank: int, options: dict[str, Any], config: MobulaConfig, host: str | None
) -> ManagedProcess:
    actor_class = ray.remote(ACTOR_CLASSES[role]).options(
        name=f"{NAME_PREFIX}{role}-{rank}", namespace=config.ray.namespace, **options
    )
    actor = actor_class.remote(config, rank, host)
    return ManagedProcess(role=role, rank=rank, handle=RayProcess(actor))


def _placement_timeout_s(config: MobulaConfig) -> float:
    """A cluster of others may have to get its nodes first."""
    return config.ray.start_timeout_s if config.ray.address else PLACEMENT_TIMEOUT_S


def _group_name(role: RoleName, namespace: str) -> str:
    return f"{namespace}/{NAME_PREFIX}{role}s"


def _found_ranks(namespace: str) -> dict[RoleName, list[int]]:
    """Of the actors that a controller before this one has left, ascending."""
    found: dict[RoleName, list[int]] = {role: [] for role in RoleName}
    for actor in list_named_actors(all_namespaces=True):
        role, _, rank = actor["name"].removeprefix(NAME_PREFIX).rpartition("-")
        if actor["namespace"] == namespace and role in found:
            found[RoleName(role)].append(int(rank))
    return {role: sorted(ranks) for role, ranks in found.items()}


def _place(role: RoleName, actors: list[ActorConfig], config: MobulaConfig) -> PlacementGroup:
    """One bundle per actor; those of a controller before this one if there are any.

    Raises StartError when Ray finds no room in time.
    """
    name, timeout_s = _group_name(role, config.ray.namespace), _placement_timeout_s(config)
    with suppress(ValueError):  # there is none
        found: PlacementGroup = get_placement_group(name)
        return found
    bundles = [_bundle(actor) for actor in actors]
    selector = [actor.labels for actor in actors] if any(actor.labels for actor in actors) else None
    strategy = actors[0].strategy
    group: PlacementGroup = placement_group(
        bundles, strategy.value, name=name, lifetime="detached", bundle_label_selector=selector
    )
    if not group.wait(timeout_s):
        free = {name: amount for name, amount in ray.available_resources().items() if name in ("CPU", "GPU")}
        raise StartError(
            f"Ray found no place for {len(actors)} {role}s of {bundles} ({strategy}, labels {selector}) "
            f"in {timeout_s:.0f} s; free: {free}; lower the count or num_cpus/num_gpus, or add nodes"
        )
    return group


def _bundle(config: ActorConfig) -> dict[str, float]:
    amounts = {"CPU": config.num_cpus, "GPU": config.num_gpus}
    return {name: amount for name, amount in amounts.items() if amount} or {"CPU": 0.001}


def _in_group(actor: ActorConfig, group: PlacementGroup, rank: int) -> dict[str, Any]:
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
    return _options(actor) | {"scheduling_strategy": strategy}


def _unbooked_options(config: MobulaConfig, role: RoleName, rank: int) -> dict[str, Any]:
    """Of a process for which nothing was booked at the start. On a cluster of ours there is nobody to book against."""
    actor: ActorConfig = config.attention_workers
    if role is RoleName.SHARD:
        actor = config.expert_shards.actor_config(rank)
    if config.ray.address is None:
        actor = actor.model_copy(update={"num_cpus": 0.0})
    return _options(actor) | ({"label_selector": actor.labels} if actor.labels else {})


def _options(config: ActorConfig) -> dict[str, Any]:
    # No runtime_env: with one, Ray starts a process for this actor alone instead of taking one that is already there.
    return {
        "num_cpus": config.num_cpus,
        "num_gpus": config.num_gpus,
        "lifetime": "detached",  # from the controller
        "max_restarts": -1,
        "max_task_retries": 0,  # the controller repeats what must be repeated
        "max_concurrency": ACTOR_THREADS,
        "enable_task_events": False,  # Ray would keep 100,000 of them: health is asked for several times a second
    }


def _end_process() -> None:
    os._exit(os.EX_UNAVAILABLE)


def _settle(answer: Future[Any], done: Future[Any]) -> None:
    error = done.exception()
    if error is None:
        answer.set_result(done.result())
    elif isinstance(error, RayActorError) or (isinstance(error, RayTaskError) and isinstance(error.cause, LoopEnded)):
        answer.set_exception(ProcessDied(str(error)))  # one that has stopped is as good as dead until it is
    elif isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        answer.set_exception(error.cause)
    else:
        answer.set_exception(error)
