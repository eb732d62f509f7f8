"""The controller's actor as a plain object: no Ray cluster, its processes obey at once."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from cluster.client import AdminClient
from cluster.config import MobulaConfig, parse_config
from cluster.controller.process import ManagedProcess, RoleName
from cluster.roles import actors
from cluster.roles.actors import ControllerActor
from router.placement import PlacementRequest
from tests.cluster.fake_processes import FakeProcess
from tests.fake_experts import MOE_LAYER_IDS, grouped_gate, placed

HOST = "127.0.0.1"
OWNER = "who created it"
CONFIG = parse_config(None)


@pytest.fixture(autouse=True)
def keep_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' process stays as it is."""
    monkeypatch.setattr(actors, "NICENESS", 0)


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> FakeProcess:
    """Beside a shard the only process that the actor is given."""
    process = FakeProcess("gateway-0")
    managed = [
        ManagedProcess(role=RoleName.SHARD, rank=0, handle=FakeProcess("shard-0")),
        ManagedProcess(role=RoleName.GATEWAY, rank=0, handle=process),
    ]
    monkeypatch.setattr(actors, "_create_processes", lambda config, host: managed)
    return process


@pytest.fixture
def actor(gateway: FakeProcess) -> Iterator[ControllerActor]:
    request = PlacementRequest(moe_layer_ids=MOE_LAYER_IDS, gate=grouped_gate(), ep_size=1, expert_bytes=1)
    actor = ControllerActor(OWNER, CONFIG, placed(grouped_gate(), 1), request, HOST, None)
    yield actor
    actor._starting.result()  # one that is stopped while it starts would end this process a little later
    actor.stop(OWNER, 0.0)


def told_admin_addresses(gateway: FakeProcess) -> list[str]:
    return [address for *_, address in gateway.told("update_members")]


def test_the_gateway_is_told_where_the_controllers_calls_are_answered(
    actor: ControllerActor, gateway: FakeProcess
) -> None:
    assert actor.start(OWNER, CONFIG)
    while not told_admin_addresses(gateway):
        time.sleep(0.01)  # the controller's thread goes round; the test's own time limit ends it
    (address,) = told_admin_addresses(gateway)
    assert address.startswith(f"{HOST}:")
    with AdminClient(address) as client:
        assert [process.name for process in client.status().processes] == ["shard-0", "gateway-0"]


def test_a_controller_that_stops_answers_no_more(actor: ControllerActor) -> None:
    assert actor.start(OWNER, CONFIG)
    assert actor._controller
    address = actor._controller.admin_address
    assert actor.stop(OWNER, 0.0)
    with AdminClient(address) as client, pytest.raises(grpc.RpcError) as raised:
        client.status()
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_controller_that_cannot_start_says_why_and_ends_so_that_ray_starts_it_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> list[ManagedProcess]:
        raise ConnectionError("Ray's head does not answer")

    has_ended = threading.Event()
    monkeypatch.setattr(actors, "_create_processes", fail)
    monkeypatch.setattr(actors, "_end_process", has_ended.set)
    monkeypatch.setattr(actors, "FAILED_END_S", 0.05)
    request = PlacementRequest(moe_layer_ids=MOE_LAYER_IDS, gate=grouped_gate(), ep_size=1, expert_bytes=1)
    actor = ControllerActor(OWNER, CONFIG, placed(grouped_gate(), 1), request, HOST, None)
    assert has_ended.wait(10.0)  # also if nobody waits for it
    with pytest.raises(ConnectionError, match="head does not answer"):
        actor.start(OWNER, CONFIG)


def test_a_shard_that_is_added_where_one_has_left_takes_what_was_booked_for_it(
    actor: ControllerActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    created: dict[int, dict[str, Any]] = {}

    def create(role: RoleName, rank: int, options: dict[str, Any], config: MobulaConfig, host: str) -> ManagedProcess:
        created[rank] = options
        return ManagedProcess(role=role, rank=rank, handle=FakeProcess(f"{role}-{rank}"))

    monkeypatch.setattr(actors, "get_placement_group", lambda name: f"the group {name}")
    monkeypatch.setattr(actors, "_create_process", create)
    count = CONFIG.expert_shards.count
    actor._create_process(RoleName.SHARD, count - 1)
    actor._create_process(RoleName.SHARD, count)
    actor._create_process(RoleName.WORKER, 100)
    strategy = created[count - 1]["scheduling_strategy"]
    assert (strategy.placement_group, strategy.placement_group_bundle_index) == (
        "the group mobula/mobula-shards",
        count - 1,
    )
    assert "scheduling_strategy" not in created[count]
    assert "scheduling_strategy" not in created[100]
