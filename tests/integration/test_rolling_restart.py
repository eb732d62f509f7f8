"""Every shard and worker is replaced under load: real roles, real gRPC, the real controller; only Ray is not there."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc

from cluster.commands.restart_command import restart_all
from cluster.config import RebalancingConfig
from cluster.controller.admin_messages import status_message
from cluster.controller.balance import Proposer
from cluster.controller.controller import Controller
from cluster.controller.process import ManagedProcess, RoleName
from cluster.roles.role import Role
from cluster.roles.shard_role import ShardRole
from cluster.roles.worker_role import WorkerRole
from experts.kernels.library import native
from protos import admin_pb2
from tests.checkpoints import write_checkpoint
from tests.role_process import RoleProcess
from tests.system import HOST, TIMEOUT_S, System

NUM_TOKENS = 100
PROMPTS = [[5 + i, 90, 17, 250 - i] * (1 + 5 * (i % 3)) for i in range(6)]


class Admin:
    """Asks a controller of this process."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    def status(self) -> admin_pb2.GetStatusResponse:
        return status_message(self._controller.status())

    def restart(self, role: "admin_pb2.ProcessRole", rank: int) -> None:
        name = admin_pb2.ProcessRole.Name(role).removeprefix("PROCESS_ROLE_").lower()
        self._controller.restart(RoleName(name), rank)


@contextmanager
def controlled(system: System) -> Iterator[Controller]:
    def process(role: RoleName, rank: int, create: Callable[[], Role], member: Role) -> ManagedProcess:
        return ManagedProcess(role=role, rank=rank, handle=RoleProcess(create, member))

    config, shards, workers = system.config, list(system.shards), list(system.workers)
    processes = [
        *(process(RoleName.SHARD, i, lambda i=i: ShardRole(config, i, HOST), role) for i, role in enumerate(shards)),
        *(process(RoleName.WORKER, i, lambda i=i: WorkerRole(config, i, HOST), role) for i, role in enumerate(workers)),
        process(RoleName.GATEWAY, 0, lambda: system.gateway, system.gateway),
    ]
    controller = Controller(
        processes,
        system.plan.expert_map,
        Proposer(lambda load, current, version, shards: current, system.plan.model.expert_bytes),
        RebalancingConfig(),
        lambda rank: processes[rank],
        drain_timeout_s=0.0,  # so that answers are under way when it is over
    )
    controller.start()
    give_up_s = time.monotonic() + TIMEOUT_S
    while not controller.status().is_serving:
        assert time.monotonic() < give_up_s
        time.sleep(0.01)
    try:
        yield controller
    finally:
        controller._stopping.set()
        controller._thread.join()
        system.shards = [p.handle.role for p in processes if p.role is RoleName.SHARD]
        system.workers = [p.handle.role for p in processes if p.role is RoleName.WORKER]
        for managed in processes:
            managed.handle.close()


def test_no_request_notices(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", "v2", seed=7, num_hidden_layers=2)
    dtype = "float32" if native() is None else "bfloat16"
    with System(folder, num_workers=2, num_shards=2, dtype=dtype) as system:
        expected = [system.greedy(prompt, NUM_TOKENS) for prompt in PROMPTS]
        stopping, answers, wrong = threading.Event(), [], []

        def client(prompt: list[int], answer: list[int]) -> None:
            while not stopping.is_set():
                try:
                    tokens = system.greedy(prompt, NUM_TOKENS)
                except grpc.RpcError as error:
                    wrong.append(error)
                    return
                (answers if tokens == answer else wrong).append(tokens)

        threads = [threading.Thread(target=client, args=pair) for pair in zip(PROMPTS, expected, strict=True)]
        with controlled(system) as controller:
            for thread in threads:
                thread.start()
            replaced: list[str] = []
            for role in (RoleName.SHARD, RoleName.WORKER):
                restart_all(Admin(controller), role, TIMEOUT_S, replaced.append)
            stopping.set()
            for thread in threads:
                thread.join(TIMEOUT_S)
        assert wrong == []
        assert len(answers) >= len(PROMPTS)
        assert replaced == [f"{name} is replaced" for name in ("shard-0", "shard-1", "worker-0", "worker-1")]
        registry = system.gateway._registry
        assert registry.get_sample_value("mobula_gateway_resumes_total", {"reason": "stopping"}) > 0
