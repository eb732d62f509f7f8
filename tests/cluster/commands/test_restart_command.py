"""The order in which processes are replaced, and what is waited for."""

import grpc
import pytest

from cluster.commands.restart_command import RestartTimeout, restart_all
from cluster.controller.process import RoleName
from protos import admin_pb2


class NotYet(grpc.RpcError):
    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.FAILED_PRECONDITION


class FakeAdmin:
    """Two shards, two workers, a gateway; each is back after two looks at the status."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.generations = dict.fromkeys(("shard-0", "shard-1", "worker-0", "worker-1", "gateway-0"), 0)
        self.restarted: list[str] = []
        self.num_looks_until_back = 0
        self.comes_back = True

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def status(self) -> admin_pb2.GetStatusResponse:
        self.num_looks_until_back -= self.comes_back
        is_back = self.num_looks_until_back <= 0
        processes = [
            admin_pb2.ProcessStatus(
                name=name, generation="" if name in self.restarted[-1:] and not is_back else str(generation)
            )
            for name, generation in self.generations.items()
        ]
        return admin_pb2.GetStatusResponse(processes=processes, is_serving=is_back)

    def restart(self, role: "admin_pb2.ProcessRole", rank: int) -> None:
        if self.num_looks_until_back > 0:
            raise NotYet
        name = admin_pb2.ProcessRole.Name(role).removeprefix("PROCESS_ROLE_").lower()
        self.restarted.append(f"{name}-{rank}")
        self.generations[self.restarted[-1]] += 1
        self.num_looks_until_back = 2


def run(admin: FakeAdmin, only: RoleName | None = None) -> None:
    restart_all(admin, only, 10.0, lambda text: None, lambda: admin.now_s, admin.sleep)


def test_every_process_is_replaced_once_and_one_at_a_time() -> None:
    admin = FakeAdmin()
    run(admin)
    assert admin.restarted == ["shard-0", "shard-1", "worker-0", "worker-1", "gateway-0"]
    assert set(admin.generations.values()) == {1}


class Gone(grpc.RpcError):
    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.INVALID_ARGUMENT


def test_a_process_that_has_left_meanwhile_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    admin, restart = FakeAdmin(), FakeAdmin.restart

    def restart_others(self: FakeAdmin, role: "admin_pb2.ProcessRole", rank: int) -> None:
        if (role, rank) == (admin_pb2.PROCESS_ROLE_SHARD, 1):
            raise Gone
        restart(self, role, rank)

    monkeypatch.setattr(FakeAdmin, "restart", restart_others)
    run(admin)
    assert admin.restarted == ["shard-0", "worker-0", "worker-1", "gateway-0"]


def test_only_one_role_if_asked_for() -> None:
    admin = FakeAdmin()
    run(admin, RoleName.WORKER)
    assert admin.restarted == ["worker-0", "worker-1"]


def test_a_process_that_does_not_come_back_is_named() -> None:
    admin = FakeAdmin()
    admin.comes_back = False
    with pytest.raises(RestartTimeout, match="shard-0 was not replaced within 10 s"):
        run(admin)
    assert admin.restarted == ["shard-0"]
