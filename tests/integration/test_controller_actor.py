"""The controller's actor as a plain object: no Ray cluster, its processes obey at once."""

from collections.abc import Iterator

import grpc
import pytest

from cluster.client import AdminClient
from cluster.config import parse_config
from cluster.controller.process import ManagedProcess, RoleName
from cluster.roles import actors
from cluster.roles.actors import ControllerActor
from router.placement import PlacementRequest
from tests.cluster.fake_processes import FakeProcess
from tests.fake_experts import MOE_LAYER_IDS, grouped_gate, placed

HOST = "127.0.0.1"


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> FakeProcess:
    """The only process that the actor is given."""
    process = FakeProcess("gateway-0")
    managed = ManagedProcess(role=RoleName.GATEWAY, rank=0, handle=process)
    monkeypatch.setattr(actors, "_create_processes", lambda config, host: [managed])
    return process


@pytest.fixture
def actor(gateway: FakeProcess) -> Iterator[ControllerActor]:
    request = PlacementRequest(moe_layer_ids=MOE_LAYER_IDS, gate=grouped_gate(), ep_size=1, expert_bytes=1)
    actor = ControllerActor(parse_config(None), placed(grouped_gate(), 1), request, HOST)
    yield actor
    actor.stop(0.0)


def told_admin_addresses(gateway: FakeProcess) -> list[str]:
    return [address for *_, address in gateway.told("update_members")]


def test_the_gateway_is_told_where_the_controllers_calls_are_answered(
    actor: ControllerActor, gateway: FakeProcess
) -> None:
    actor.start()
    while not told_admin_addresses(gateway):
        pass  # the controller's thread goes round; the test's own time limit ends it
    (address,) = told_admin_addresses(gateway)
    assert address.startswith(f"{HOST}:")
    with AdminClient(address) as client:
        assert [process.name for process in client.status().processes] == ["gateway-0"]


def test_a_controller_that_stops_answers_no_more(actor: ControllerActor) -> None:
    actor.start()
    assert actor._controller
    address = actor._controller.admin_address
    actor.stop(0.0)
    with AdminClient(address) as client, pytest.raises(grpc.RpcError) as raised:
        client.status()
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
