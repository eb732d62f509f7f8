"""The admin calls over real gRPC: the controller's server, the gateway before it, a stock client."""

import threading
from collections.abc import Callable, Iterator

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status

from cluster.client import AdminClient
from cluster.controller.admin_messages import cluster_status
from cluster.controller.admin_server import SERVICE, AdminServer
from cluster.controller.rebalance import RebalancePlan
from cluster.gateway.admin_relay import AdminRelay
from protos import admin_pb2, errors
from tests.fake_controller import (
    HOST,
    MOVES,
    FakeController,
    GatewayHost,
    admin_server,
    gateway_host,
    rebalance_plan,
    serving_status,
)


@pytest.fixture
def controller() -> FakeController:
    return FakeController()


@pytest.fixture
def gateway(controller: FakeController) -> Iterator[GatewayHost]:
    """One that knows the controller."""
    with admin_server(controller) as address, gateway_host() as host:
        host.update_admin(address)
        yield host


class SlowController(FakeController):
    """Its plans take until `may_end` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.is_planning, self.may_end = threading.Event(), threading.Event()

    def plan_rebalance(self) -> RebalancePlan:
        self.is_planning.set()
        assert self.may_end.wait(30.0)
        return self.plan

    def ask(self, client: AdminClient) -> grpc.Future:
        """A dry run that is being computed when this returns."""
        call = client._stub.Rebalance.future(admin_pb2.RebalanceRequest(dry_run=True), timeout=30.0)
        assert self.is_planning.wait(30.0)
        return call


@pytest.fixture
def slow() -> Iterator[SlowController]:
    controller = SlowController()
    yield controller
    controller.may_end.set()


def refused(call: Callable[[], object]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as raised:
        call()
    return raised.value


def reason_of(error: grpc.RpcError) -> str:
    info = error_details_pb2.ErrorInfo()
    assert rpc_status.from_call(error).details[0].Unpack(info)
    return info.reason


def test_a_status_asked_of_the_gateway_is_the_controllers(gateway: GatewayHost) -> None:
    with AdminClient(gateway.address) as client:
        assert cluster_status(client.status()) == serving_status(1)


def test_a_dry_run_says_what_would_be_moved_and_begins_nothing(
    gateway: GatewayHost, controller: FakeController
) -> None:
    with AdminClient(gateway.address) as client:
        plan = client.rebalance(is_dry_run=True)
    assert len(plan.moves) == len(MOVES)
    assert not plan.started
    assert controller.num_begun == 0


def test_a_rebalance_is_begun_once(gateway: GatewayHost, controller: FakeController) -> None:
    with AdminClient(gateway.address) as client:
        assert client.rebalance(is_dry_run=False).started
    assert controller.num_begun == 1


def test_shards_are_scaled_and_drained_through_the_gateway(gateway: GatewayHost, controller: FakeController) -> None:
    with AdminClient(gateway.address) as client:
        assert list(client.scale_shards(4).added_ep_ranks) == [2, 3]
        assert list(client.scale_shards(1).drained_ep_ranks) == [1]
        assert list(client.scale_workers(3).added_dp_ranks) == [1, 2]
        assert list(client.scale_workers(0).drained_dp_ranks) == [0]
        client.drain(admin_pb2.PROCESS_ROLE_SHARD, 1)
        error = refused(lambda: client.drain(admin_pb2.PROCESS_ROLE_UNSPECIFIED, 0))
    assert controller.drained == [1]
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_workers_are_drained_and_processes_replaced_through_the_gateway(
    gateway: GatewayHost, controller: FakeController
) -> None:
    with AdminClient(gateway.address) as client:
        client.drain(admin_pb2.PROCESS_ROLE_WORKER, 1)
        client.restart(admin_pb2.PROCESS_ROLE_GATEWAY, 0)
        error = refused(lambda: client.restart(admin_pb2.PROCESS_ROLE_UNSPECIFIED, 0))
    assert controller.ended == ["drain worker-1", "restart gateway-0"]
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_what_the_controller_refuses_reaches_the_client_with_its_details(
    gateway: GatewayHost, controller: FakeController
) -> None:
    controller.error = errors.RebalanceRefused("a rebalance to version 2 is staging", retry_after_s=5.0)
    with AdminClient(gateway.address) as client:
        error = refused(lambda: client.rebalance(is_dry_run=False))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert error.details() == "a rebalance to version 2 is staging"
    assert reason_of(error) == "REBALANCE_REFUSED"
    kinds = {detail.type_url.rpartition(".")[2] for detail in rpc_status.from_call(error).details}
    assert kinds == {"ErrorInfo", "RetryInfo"}


def test_an_unavailable_that_the_controller_itself_says_is_passed_on_as_it_is(
    gateway: GatewayHost, controller: FakeController
) -> None:
    controller.error = errors.Unavailable("stopping")
    with AdminClient(gateway.address) as client:
        assert refused(lambda: client.rebalance(is_dry_run=True)).details() == "stopping"


def test_a_fault_of_the_controller_is_internal_with_an_id_and_without_its_words(
    gateway: GatewayHost, controller: FakeController
) -> None:
    controller.error = ValueError("secret")
    with AdminClient(gateway.address) as client:
        error = refused(lambda: client.rebalance(is_dry_run=True))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "in the server's log" in error.details()
    assert "secret" not in error.details()


@pytest.mark.parametrize("method", ["GetStatus", "Rebalance", "ScaleShards", "ScaleWorkers", "Drain"])
@pytest.mark.parametrize("request_bytes", [b"\x98\x06\x01", b"\xff"], ids=["unknown field", "no message"])
def test_a_request_that_is_none_is_the_clients_fault(gateway: GatewayHost, method: str, request_bytes: bytes) -> None:
    with grpc.insecure_channel(gateway.address) as channel:
        call = channel.unary_unary(f"/{SERVICE}/{method}")
        error = refused(lambda: call(request_bytes, timeout=10.0))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason_of(error) == "INVALID_REQUEST"


def test_a_gateway_that_does_not_know_the_controller_says_so() -> None:
    with gateway_host() as host, AdminClient(host.address) as client:
        error = refused(client.status)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "does not know the controller yet" in error.details()
        assert reason_of(error) == "UNAVAILABLE"


def test_a_controller_that_is_gone_is_unavailable_and_its_successor_is_found(controller: FakeController) -> None:
    with gateway_host() as host, AdminClient(host.address) as client:
        with admin_server(controller) as address:
            host.update_admin(address)
            client.status()
        error = refused(client.status)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert f"the controller at {address} cannot be reached" in error.details()
        assert reason_of(error) == "UNAVAILABLE"
        with admin_server(controller) as address:
            host.update_admin(address)
            assert client.status().is_serving


def test_calls_in_flight_to_a_controller_that_is_replaced_end_with_a_status(
    controller: FakeController, slow: SlowController
) -> None:
    with admin_server(slow) as first, admin_server(controller) as second, gateway_host() as host:
        host.update_admin(first)
        with AdminClient(host.address) as client:
            call = slow.ask(client)
            host.update_admin(second)
            error = call.exception(timeout=10.0)
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert f"the controller at {first} was let go of" in error.details()
            assert client.status().is_serving


def test_a_client_that_leaves_ends_its_call_and_no_other(controller: FakeController, slow: SlowController) -> None:
    with admin_server(slow) as address, gateway_host() as host, AdminClient(host.address) as client:
        host.update_admin(address)
        call = slow.ask(client)
        call.cancel()
        assert client.status().is_serving


def test_a_status_is_answered_while_a_plan_is_computed(slow: SlowController) -> None:
    with admin_server(slow) as address, AdminClient(address) as client:
        call = slow.ask(client)
        assert client.status().is_serving
        assert not call.done()
        slow.may_end.set()
        assert len(call.result(timeout=10.0).moves) == len(MOVES)


def test_a_controller_that_is_late_is_named_with_the_time_it_was_given(
    slow: SlowController, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.gateway.gateway.AdminRelay", lambda credentials: AdminRelay(0.2, credentials))
    with admin_server(slow) as address, gateway_host() as host, AdminClient(host.address) as client:
        host.update_admin(address)
        error = refused(lambda: client.rebalance(is_dry_run=True))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert f"the controller at {address} did not answer within 0.2 s" in error.details()
        assert reason_of(error) == "DEADLINE_EXCEEDED"


def test_the_largest_plans_fit_one_message() -> None:
    moves = tuple(
        (rank, layer, expert, 44_040_192) for layer in range(61) for expert in range(256) for rank in (1, 319)
    )
    plan = rebalance_plan(moves=tuple(type(MOVES[0])(*move) for move in moves))
    with admin_server(FakeController(plan)) as address, gateway_host() as host, AdminClient(host.address) as client:
        host.update_admin(address)
        assert len(client.rebalance(is_dry_run=True).moves) == len(moves)


def test_a_stock_client_finds_the_calls_by_reflection(gateway: GatewayHost) -> None:
    with grpc.insecure_channel(gateway.address) as channel:
        assert SERVICE in ProtoReflectionDescriptorDatabase(channel).get_services()


def test_a_taken_port_is_an_error_that_says_so(controller: FakeController) -> None:
    with admin_server(controller) as address:
        second = AdminServer(controller)
        with pytest.raises(errors.Unavailable, match="the port is taken"):
            second.start(HOST, int(address.rpartition(":")[2]))
        second.stop()


def test_a_server_stops_at_once_though_a_plan_is_being_computed_and_may_be_stopped_again(slow: SlowController) -> None:
    server = AdminServer(slow)
    with AdminClient(server.start(HOST)) as client:
        call = slow.ask(client)
        server.stop()
        assert call.exception(timeout=10.0) is not None
    server.stop()
