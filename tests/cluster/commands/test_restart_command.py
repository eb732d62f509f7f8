"""The order in which processes are replaced, and what is waited for."""

import grpc
import pytest

from cluster.commands.restart_command import RestartTimeout, restart_all
from cluster.controller.process import RoleName
from protos import admin_pb2


class NotYet(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode = grpc.StatusCode.FAILED_PRECONDITION) -> None:
        self._code = code

    def code(self) -> grpc.StatusCode:
        return self._code


class FakeAdmin:
    """Two shards, two workers, a gateway; each is back after two looks at the status."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.generations = dict.fromkeys(("shard-0", "shard-1", "worker-0", "worker-1", "gateway-0"), 0)
        self.restarted: list[str] = []
        self.num_looks_until_back = 0
        self.comes_back = True
        self.leaves_after: dict[str, int] = {}  # so many restarts

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def status(self) -> admin_pb2.GetStatusResponse:
        self.num_looks_until_back -= self.comes_back
        is_back = self.num_looks_until_back <= 0
        processes = [
            admin_pb2.ProcessStatus(
                name=name,
                generation="" if name in self.restarted[-1:] and not is_back else str(generation),
                is_leaving=self.is_leaving(name),
            )
            for name, generation in self.generations.items()
        ]
        return admin_pb2.GetStatusResponse(processes=processes, is_serving=is_back)

    def is_leaving(self, name: str) -> bool:
        return len(self.restarted) >= self.leaves_after.get(name, 99)

    def restart(self, role: "admin_pb2.ProcessRole", rank: int) -> None:
        if self.num_looks_until_back > 0:
            raise NotYet
        name = admin_pb2.ProcessRole.Name(role).removeprefix("PROCESS_ROLE_").lower()
        self.restarted.append(f"{name}-{rank}")
        self.generations[self.restarted[-1]] += 1
        self.num_looks_until_back = 2


class StoppingAdmin(FakeAdmin):
    """Its gateway stops while it is asked for the status, so many times from the first or a later look on."""

    def __init__(self, first_look: int, num_looks: int = 3, code: grpc.StatusCode = grpc.StatusCode.CANCELLED) -> None:
        super().__init__()
        self.num_looks = 0
        self.broken = range(first_look, first_look + num_looks)
        self.code = code

    def status(self) -> admin_pb2.GetStatusResponse:
        self.num_looks += 1
        if self.num_looks in self.broken:
            raise NotYet(self.code)
        return super().status()


def run(admin: FakeAdmin, only: RoleName | None = None) -> list[str]:
    """What is shown."""
    shown: list[str] = []
    restart_all(admin, only, 10.0, shown.append, lambda: admin.now_s, admin.sleep)
    return shown


def test_every_process_is_replaced_once_and_one_at_a_time() -> None:
    admin = FakeAdmin()
    run(admin)
    assert admin.restarted == ["shard-0", "shard-1", "worker-0", "worker-1", "gateway-0"]
    assert set(admin.generations.values()) == {1}


def test_that_the_only_gateway_is_away_for_a_while_is_said_before_anything_is_replaced() -> None:
    admin = FakeAdmin()
    refused = "gateway-0 is the only gateway: while it is replaced, new calls are refused for some seconds"
    assert run(admin)[:2] == [refused, "shard-0 is replaced"]
    assert run(admin, RoleName.GATEWAY) == [refused, "gateway-0 is replaced"]
    assert run(admin, RoleName.WORKER) == ["worker-0 is replaced", "worker-1 is replaced"]
    admin.generations["gateway-1"] = 0
    assert run(admin, RoleName.GATEWAY) == ["gateway-0 is replaced", "gateway-1 is replaced"]


class Gone(grpc.RpcError):
    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.INVALID_ARGUMENT


def test_a_process_that_leaves_before_its_turn_is_left_alone_and_that_is_said() -> None:
    admin = FakeAdmin()
    admin.leaves_after = {"shard-0": 0, "worker-1": 2}
    assert run(admin)[1:] == [
        "shard-0 is leaving, left alone",
        "shard-1 is replaced",
        "worker-0 is replaced",
        "worker-1 is leaving, left alone",
        "gateway-0 is replaced",
    ]
    assert admin.restarted == ["shard-1", "worker-0", "gateway-0"]


def test_a_process_that_is_drained_while_it_is_replaced_is_not_waited_for() -> None:
    admin = FakeAdmin()
    admin.leaves_after = {"shard-1": 2}
    assert run(admin)[2] == "shard-1 is leaving, left alone"


def test_a_process_that_has_left_before_its_turn_is_passed_over() -> None:
    admin = FakeAdmin()
    first = admin.status()
    del admin.generations["shard-1"]
    looks = [first]
    admin_status, admin.status = admin.status, lambda: looks.pop() if looks else admin_status()  # type: ignore[method-assign]
    assert run(admin)[2] == "shard-1 has left meanwhile"


def test_a_process_that_leaves_at_the_moment_when_it_is_asked_for_is_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    admin, restart = FakeAdmin(), FakeAdmin.restart

    def restart_others(self: FakeAdmin, role: "admin_pb2.ProcessRole", rank: int) -> None:
        if (role, rank) == (admin_pb2.PROCESS_ROLE_SHARD, 1):
            raise Gone
        restart(self, role, rank)

    monkeypatch.setattr(FakeAdmin, "restart", restart_others)
    assert run(admin)[2] == "shard-1 has left or is leaving, left alone"
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


@pytest.mark.parametrize("first_look", [1, 2, 5])
def test_a_gateway_that_stops_while_it_is_asked_is_asked_again(first_look: int) -> None:
    admin = StoppingAdmin(first_look)
    run(admin)
    assert set(admin.generations.values()) == {1}


def test_what_nobody_answers_at_first_is_told_soon_and_not_after_the_time_for_a_process() -> None:
    admin = StoppingAdmin(1, 10_000, grpc.StatusCode.UNAVAILABLE)
    with pytest.raises(NotYet):
        restart_all(admin, None, 600.0, lambda text: None, lambda: admin.now_s, admin.sleep)
    assert admin.now_s <= 10.0
