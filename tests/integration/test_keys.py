"""Clients with and without keys at a gateway, over real gRPC: what each may do, what is logged and counted of it."""

import asyncio
import datetime
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from prometheus_client import CollectorRegistry

from cluster.gateway.relay import forwarded
from cluster.security.caller import Caller, current_caller
from cluster.security.key_guard import KeyCheck
from cluster.security.keys import KeyFile, KeyRing, Right, new_key, utc_now, write_keys
from cluster.security.metrics import KeyMetrics
from protos import admin_pb2, admin_pb2_grpc, generation_pb2, generation_pb2_grpc
from protos.guard import Guard
from tests.fake_controller import FakeController, GatewayHost, admin_server, gateway_host

TIMEOUT_S = 10.0


class KeyedGateway:
    """One with four keys; `texts` by id is what their holders show."""

    def __init__(self, path: Path) -> None:
        self.path = path
        yesterday = utc_now() - datetime.timedelta(days=1)
        made = [
            new_key("user", frozenset({Right.GENERATE}), max_concurrent_requests=3),
            new_key("operator", frozenset(Right)),
            new_key("late", frozenset(Right), expires=yesterday),
            new_key("bad", frozenset(Right), is_revoked=True),
        ]
        self.keys = [key for key, _ in made]
        self.texts = {key.id: text for key, text in made}
        write_keys(path, KeyFile(keys=tuple(self.keys)))
        self.registry = CollectorRegistry()
        self.guard = Guard(KeyCheck(KeyRing(path), KeyMetrics(self.registry)))
        self.host: GatewayHost

    def ask(self, method: str, key: str | None) -> None:
        """key: an id, or other text to show as it is."""
        shown = self.texts.get(key or "", key)
        metadata = () if shown is None else (("authorization", f"Bearer {shown}"),)
        with grpc.insecure_channel(self.host.address) as channel:
            if method == "status":
                stub = admin_pb2_grpc.AdminStub(channel)
                stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=TIMEOUT_S, metadata=metadata)
            elif method == "generate":
                inference = generation_pb2_grpc.InferenceStub(channel)
                list(inference.Generate(generation_pb2.GenerateRequest(text="a"), timeout=TIMEOUT_S, metadata=metadata))
            else:
                channel.unary_unary(method)(b"", timeout=TIMEOUT_S, metadata=metadata)

    def refused(self, method: str, key: str | None) -> grpc.RpcError:
        with pytest.raises(grpc.RpcError) as raised:
            self.ask(method, key)
        return raised.value


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[KeyedGateway]:
    keyed = KeyedGateway(tmp_path / "keys.json")
    with admin_server(FakeController()) as address, gateway_host(guards=[keyed.guard]) as host:
        host.update_admin(address)
        keyed.host = host
        yield keyed


def test_a_key_with_the_right_is_let_through_and_counted_by_its_id(gateway: KeyedGateway) -> None:
    gateway.ask("status", "operator")
    assert gateway.refused("generate", "user").code() is grpc.StatusCode.UNAVAILABLE  # let through: there is no worker
    assert gateway.registry.get_sample_value("mobula_key_calls_total", {"key_id": "operator"}) == 1
    assert gateway.registry.get_sample_value("mobula_key_calls_total", {"key_id": "user"}) == 1


CASES = {
    "none": (None, "UNAUTHENTICATED", "missing"),
    "garbage": ("garbage", "UNAUTHENTICATED", "unknown"),
    "wrong secret": ("operator.AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA", "UNAUTHENTICATED", "unknown"),
    "expired": ("late", "UNAUTHENTICATED", "expired"),
    "revoked": ("bad", "UNAUTHENTICATED", "revoked"),
    "without the right": ("user", "PERMISSION_DENIED", "right"),
}


@pytest.mark.parametrize("case", CASES)
def test_any_other_key_is_refused_logged_and_counted_without_its_secret(
    gateway: KeyedGateway, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    key, code, reason = CASES[case]
    error = gateway.refused("status", key)
    assert error.code().name == code
    assert gateway.registry.get_sample_value("mobula_key_refusals_total", {"reason": reason}) == 1
    assert "refused /mobula.v1.Admin/GetStatus from ipv4:127.0.0.1" in caplog.text
    for secret in (text.partition(".")[2] for text in gateway.texts.values()):
        assert secret not in caplog.text
        assert secret not in error.details()
    if key and "." in key:
        assert key.partition(".")[2] not in caplog.text


def test_reflection_has_its_own_right(gateway: KeyedGateway) -> None:
    with grpc.insecure_channel(gateway.host.address) as channel, pytest.raises(grpc.RpcError) as raised:
        ProtoReflectionDescriptorDatabase(channel).get_services()
    assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_health_needs_no_key(gateway: KeyedGateway) -> None:
    with grpc.insecure_channel(gateway.host.address) as channel:
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)


def test_a_method_that_does_not_exist_says_so(gateway: KeyedGateway) -> None:
    assert gateway.refused("/mobula.v1.Nothing/At/All", None).code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_revoked_key_is_refused_without_a_restart(gateway: KeyedGateway) -> None:
    gateway.ask("status", "operator")
    write_keys(gateway.path, KeyFile(keys=tuple(key.model_copy(update={"is_revoked": True}) for key in gateway.keys)))
    assert "operator is revoked" in gateway.refused("status", "operator").details()


def test_a_stream_ends_when_its_key_is_revoked_and_was_one_call(
    gateway: KeyedGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def endless(servicer: object, request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        while True:
            yield b""
            await asyncio.sleep(0.005)

    monkeypatch.setattr("cluster.gateway.gateway.GatewayServicer.generate", endless)
    guard = Guard(KeyCheck(KeyRing(gateway.path), KeyMetrics(registry := CollectorRegistry())), recheck_s=0.02)
    with gateway_host(guards=[guard]) as host, grpc.insecure_channel(host.address) as channel:
        shown = (("authorization", f"bearer {gateway.texts['user']}"),)
        answers = channel.unary_stream("/mobula.v1.Inference/Generate")(b"", timeout=TIMEOUT_S, metadata=shown)
        for _ in range(20):
            next(answers)
        revoked = tuple(key.model_copy(update={"is_revoked": True}) for key in gateway.keys)
        write_keys(gateway.path, KeyFile(keys=revoked))
        with pytest.raises(grpc.RpcError) as raised:
            list(answers)
    assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert registry.get_sample_value("mobula_key_calls_total", {"key_id": "user"}) == 1


def test_handlers_know_who_calls_and_the_key_stays_at_the_gateway(
    gateway: KeyedGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Caller, object]] = []

    async def seeing(servicer: object, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        seen.append((current_caller(), dict(forwarded(context))))
        return b""

    monkeypatch.setattr("cluster.gateway.gateway.GatewayServicer.get_expert_load", seeing)
    guard = gateway.guard
    with gateway_host(guards=[guard]) as host:
        gateway.host = host
        gateway.ask("/mobula.v1.Inference/GetExpertLoad", "user")
    assert seen == [(Caller(key_id="user", max_concurrent_requests=3), {})]
    assert current_caller() == Caller()


def test_a_flood_of_refusals_does_not_fill_the_log(gateway: KeyedGateway, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(40):
        gateway.refused("status", None)
    assert 1 <= caplog.text.count("refused /mobula") <= 30
