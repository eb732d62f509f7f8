"""The only place where plain classes become Ray actors. Ray starts, places, restarts and calls processes; no token
passes through it.
"""

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.config import ActorConfig, MobulaConfig
from cluster.controller.admin_server import AdminServer
from cluster.controller.balance import Proposer
from cluster.controller.controller import Controller, StartError
from cluster.controller.process import ClusterStatus, ManagedProcess, ProcessDied, RoleName
from cluster.controller.rebalance import Float64Array
from cluster.roles.role import node_address
from cluster.roles.role_actor import GatewayActor, RoleActor, ShardActor, WorkerActor
from cluster.security.process_tls import process_credentials, process_folder
from protos.credentials import PeerRole
from protos.errors import Unavailable
from router.expert_map import ExpertMap
from router.placement import PlacementRequest
from router.placement.members import ShardTraits, place_on

PLACEMENT_TIMEOUT_S = 60.0  # for Ray to find room on a cluster of ours
CONTROL_CPUS = 0.1  # booked for the controller and for the gateway
ACTOR_THREADS = 4  # so that health is answered while weights are read
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
    """The controller with the actors it owns: when it ends, they end."""

    def __init__(
        self, config: MobulaConfig, expert_map: ExpertMap, request: PlacementRequest, host: str | None
    ) -> None:
        self._config = config
        self._expert_map = expert_map
        self._request = request
        self._host = host
        self._controller: Controller | None = None
        self._admin: AdminServer | None = None

    def start(self) -> None:
        """Places and creates every actor. Raises StartError when the Ray cluster has no room."""
        self._controller = Controller(
            _create_processes(self._config, self._host),
            self._expert_map,
            _proposer(self._config, self._request),
            self._config.expert_shards.rebalancing,
            self._create_shard,
            self._config.drain_timeout_s,
        )
        certificates = process_folder(self._config.tls, PeerRole.CONTROLLER)
        self._admin = AdminServer(self._controller, process_credentials(certificates))
        self._controller.admin_address = self._admin.start(self._host or node_address(), self._config.controller.port)
        self._controller.start()

    def _create_shard(self, ep_rank: int) -> ManagedProcess:
        """One more. Ray starts it when it has room; an autoscaler makes some. Raises Unavailable."""
        actor = self._config.expert_shards.actor_config(ep_rank)
        options = _options(actor) | ({"label_selector": actor.labels} if actor.labels else {})
        try:
            return _create_process(RoleName.SHARD, ep_rank, options, self._config, self._host)
        except ValueError as error:  # Ray's word for a name that is taken
            raise Unavailable(f"shard {ep_rank} is still ending: {error}; ask again", retry_after_s=1.0) from error

    def status(self) -> ClusterStatus | None:
        """None until the actors are created."""
        return self._controller.status() if self._controller else None

    def stop(self, drain_timeout_s: float) -> None:
        """Ends every process, gateways first."""
        if self._admin:
            self._admin.stop()
        if self._controller:
            self._controller.stop(drain_timeout_s)


def create_controller(config: MobulaConfig, expert_map: ExpertMap, request: PlacementRequest, host: str | None) -> Any:
    """The controller actor. request: what later placements keep to; host: where servers listen, None for each node's
    own address.
    """
    options = {
        "name": "mobula-controller",
        "namespace": config.ray.namespace,
        "num_cpus": CONTROL_CPUS,
        "max_concurrency": ACTOR_THREADS,
        "label_selector": config.controller.labels or None,
    }
    return ray.remote(ControllerActor).options(**options).remote(config, expert_map, request, host)


def _proposer(config: MobulaConfig, request: PlacementRequest) -> Proposer:
    policy = config.expert_shards.placement_policy.value

    def place(
        load: Float64Array, current: ExpertMap, placement_version: int, shards: Mapping[int, ShardTraits]
    ) -> ExpertMap:
        return place_on(replace(request, load=load, current=current), shards, placement_version, policy)

    return Proposer(place, request.expert_bytes, config.expert_shards.traits)


def booked_cpus(config: MobulaConfig) -> float:
    """CPUs that the system books with Ray."""
    return sum(actor.num_cpus for actor in [*_actors(config, RoleName.SHARD), *_actors(config, RoleName.WORKER)]) + (
        2 * CONTROL_CPUS
    )


def _actors(config: MobulaConfig, role: RoleName) -> list[ActorConfig]:
    """What each process of a role asks of Ray, by rank."""
    if role is RoleName.WORKER:
        return [config.attention_workers] * config.attention_workers.count
    return [config.expert_shards.actor_config(ep_rank) for ep_rank in range(config.expert_shards.count)]


def _create_processes(config: MobulaConfig, host: str | None) -> list[ManagedProcess]:
    processes = []
    for role in (RoleName.SHARD, RoleName.WORKER):
        actors = _actors(config, role)
        group = _place(role, actors, _placement_timeout_s(config))
        for rank, actor in enumerate(actors):
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
            options = _options(actor) | {"scheduling_strategy": strategy}
            processes.append(_create_process(role, rank, options, config, host))
    options = _options(ActorConfig(num_cpus=CONTROL_CPUS)) | {"label_selector": config.gateway.labels or None}
    processes.append(_create_process(RoleName.GATEWAY, 0, options, config, host))
    return processes


def _create_process(
    role: RoleName, rank: int, options: dict[str, Any], config: MobulaConfig, host: str | None
) -> ManagedProcess:
    actor_class = ray.remote(ACTOR_CLASSES[role]).options(
        name=f"mobula-{role}-{rank}", namespace=config.ray.namespace, **options
    )
    actor = actor_class.remote(config, rank, host)
    return ManagedProcess(role=role, rank=rank, handle=RayProcess(actor))


def _placement_timeout_s(config: MobulaConfig) -> float:
    """A cluster of others may have to get its nodes first."""
    return config.ray.start_timeout_s if config.ray.address else PLACEMENT_TIMEOUT_S


def _place(role: RoleName, actors: list[ActorConfig], timeout_s: float) -> PlacementGroup:
    """One bundle per actor. Raises StartError when Ray finds no room in time."""
    bundles = [_bundle(actor) for actor in actors]
    selector = [actor.labels for actor in actors] if any(actor.labels for actor in actors) else None
    strategy = actors[0].strategy
    group: PlacementGroup = placement_group(bundles, strategy=strategy.value, bundle_label_selector=selector)
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


def _options(config: ActorConfig) -> dict[str, Any]:
    # No runtime_env: with one, Ray starts a process for this actor alone instead of taking one that is already there.
    return {
        "num_cpus": config.num_cpus,
        "num_gpus": config.num_gpus,
        "max_restarts": -1,
        "max_task_retries": 0,  # the controller repeats what must be repeated
        "max_concurrency": ACTOR_THREADS,
    }


def _settle(answer: Future[Any], done: Future[Any]) -> None:
    error = done.exception()
    if error is None:
        answer.set_result(done.result())
    elif isinstance(error, RayActorError):
        answer.set_exception(ProcessDied(str(error)))
    elif isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        answer.set_exception(error.cause)
    else:
        answer.set_exception(error)
