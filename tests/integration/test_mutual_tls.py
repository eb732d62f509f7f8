"""Who may call a shard, a worker, a controller, and what happens when certificates change: real TLS over loopback."""

import asyncio
import shutil
import socket
import ssl
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.gateway.http_server import get
from cluster.security.authority import Authority
from protos import rpc
from protos.certificates import CertificateFolder
from protos.credentials import PLAINTEXT, Credentials, PeerRole
from protos.loop_thread import LoopThread
from protos.mutual_tls import MutualTls, role_name
from tests.certificates import HOST, credentials, make_authority
from tests.checkpoints import write_checkpoint
from tests.system import System

SERVICE = "test.Echo"
TIMEOUT_S = 10.0


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return make_authority(tmp_path / "tls")


class EchoShard:
    """A server with a shard's certificate that answers who called, once or for ever."""

    def __init__(self, authority: Authority) -> None:
        self.loop = LoopThread("echo")
        self.address = f"{HOST}:{self.loop.run(self._start(credentials(authority, PeerRole.SHARD)))}"

    async def _start(self, shown: Credentials) -> int:
        self._server = shown.server((PeerRole.WORKER, PeerRole.SHARD), rpc.frame_options())
        handlers = {"Say": rpc.unary_handler(self.say), "Repeat": rpc.stream_handler(self.repeat)}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        health_pb2_grpc.add_HealthServicer_to_server(health_pb2_grpc.HealthServicer(), self._server)
        port = shown.listen(self._server, f"{HOST}:0")
        await self._server.start()
        return port

    async def say(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        return context.auth_context()["x509_pem_cert"][0]

    async def repeat(self, request: bytes, context: grpc.aio.ServicerContext) -> AsyncGenerator[bytes, None]:
        while True:
            yield b"again"
            await asyncio.sleep(0.01)

    def ask(self, shown: Credentials, method: str = f"/{SERVICE}/Say", peer: PeerRole = PeerRole.SHARD) -> bytes:
        async def call() -> bytes:
            async with shown.channel(self.address, peer, rpc.frame_options()) as channel:
                return await channel.unary_unary(method)(b"", timeout=TIMEOUT_S)

        return self.loop.run(call())

    def stop(self) -> None:
        self.loop.run(self._server.stop(None))
        self.loop.stop()


@pytest.fixture
def shard(authority: Authority) -> Iterator[EchoShard]:
    shard = EchoShard(authority)
    yield shard
    shard.stop()


def refusal(shard: EchoShard, shown: Credentials, **how: object) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        shard.ask(shown, **how)  # type: ignore[arg-type]
    return raised.value


@pytest.mark.parametrize("role", [PeerRole.WORKER, PeerRole.SHARD])
def test_a_shard_answers_workers_and_shards(authority: Authority, shard: EchoShard, role: PeerRole) -> None:
    assert shard.ask(credentials(authority, role))


@pytest.mark.parametrize("role", [PeerRole.GATEWAY, PeerRole.CONTROLLER])
def test_a_shard_refuses_other_roles_and_logs_who_it_was(
    authority: Authority, shard: EchoShard, role: PeerRole, caplog: pytest.LogCaptureFixture
) -> None:
    error = refusal(shard, credentials(authority, role))
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED
    assert role_name(role) in error.details()
    assert f"refused /{SERVICE}/Say from ipv4:127.0.0.1" in caplog.text


def test_any_process_may_ask_for_health(authority: Authority, shard: EchoShard) -> None:
    error = refusal(shard, credentials(authority, PeerRole.GATEWAY), method="/grpc.health.v1.Health/Check")
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED  # as this server has it: the call came through


def test_nobody_gets_in_without_a_certificate(authority: Authority, shard: EchoShard) -> None:
    assert refusal(shard, PLAINTEXT).code() is grpc.StatusCode.UNAVAILABLE
    believed = (authority.folder / "shard" / "ca.crt").read_bytes()
    options = [("grpc.ssl_target_name_override", role_name(PeerRole.SHARD))]
    channel = grpc.secure_channel(shard.address, grpc.ssl_channel_credentials(believed), options)
    with channel, pytest.raises(grpc.RpcError) as raised:
        channel.unary_unary(f"/{SERVICE}/Say")(b"", timeout=TIMEOUT_S)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("fault", ["another authority", "expired"])
def test_a_certificate_that_is_not_valid_does_not_get_in(
    authority: Authority, shard: EchoShard, tmp_path: Path, fault: str
) -> None:
    folder = authority.folder / "worker"
    if fault == "expired":
        authority.issue(folder, "worker", [role_name(PeerRole.WORKER)], days=-1)
    else:
        Authority.open(tmp_path / "other").issue(tmp_path / "w", "worker", [role_name(PeerRole.WORKER)], days=1)
        for name in ("tls.crt", "tls.key"):
            shutil.copy(tmp_path / "w" / name, folder / name)
    assert refusal(shard, credentials(authority, PeerRole.WORKER)).code() is grpc.StatusCode.UNAVAILABLE


def test_a_revoked_certificate_is_refused_by_name(
    authority: Authority, shard: EchoShard, caplog: pytest.LogCaptureFixture
) -> None:
    worker = credentials(authority, PeerRole.WORKER)
    assert shard.ask(worker)
    authority.revoke(x509.load_pem_x509_certificate((authority.folder / "worker" / "tls.crt").read_bytes()))
    error = refusal(shard, worker)
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert "revoked" in error.details()
    assert "revoked" in caplog.text


def test_a_server_of_another_role_is_not_talked_to(authority: Authority, shard: EchoShard) -> None:
    """Someone with a worker's certificate who answers at a gateway's address learns nothing."""
    error = refusal(shard, credentials(authority, PeerRole.WORKER), peer=PeerRole.GATEWAY)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "Hostname Verification" in error.details()


def test_certificates_change_under_an_open_stream_and_for_new_connections(
    authority: Authority, shard: EchoShard
) -> None:
    worker = MutualTls(CertificateFolder(authority.folder / "worker"))
    serial = [_serial(authority.folder / "worker" / "tls.crt")]

    async def run() -> None:
        channel = worker.channel(shard.address, PeerRole.SHARD, rpc.frame_options())
        stream = channel.unary_stream(f"/{SERVICE}/Repeat")(b"")
        assert await stream.read() == b"again"
        authority.issue_roles(days=1)
        serial.append(_serial(authority.folder / "worker" / "tls.crt"))
        seen = await channel.unary_unary(f"/{SERVICE}/Say")(b"", timeout=TIMEOUT_S)
        assert x509.load_pem_x509_certificate(seen).serial_number == serial[1] != serial[0]
        for _ in range(20):  # the old stream goes on
            assert await stream.read() == b"again"
        stream.cancel()
        await channel.close()

    shard.loop.run(run(), 30.0)


def test_a_server_shows_its_new_certificate_to_new_connections(authority: Authority, shard: EchoShard) -> None:
    path = authority.folder / "shard" / "tls.crt"
    before = _serial(path)
    assert shown_serial(authority, shard) == before
    authority.issue(authority.folder / "shard", "shard", [role_name(PeerRole.SHARD)], days=1)
    assert shown_serial(authority, shard) == _serial(path) != before


def shown_serial(authority: Authority, shard: EchoShard) -> int:
    """Of the certificate that the server shows to a worker that connects now."""
    context = ssl.create_default_context(cafile=authority.folder / "worker" / "ca.crt")
    context.load_cert_chain(authority.folder / "worker" / "tls.crt", authority.folder / "worker" / "tls.key")
    host, port = shard.address.split(":")
    plain = socket.create_connection((host, int(port)), TIMEOUT_S)
    with context.wrap_socket(plain, server_hostname=role_name(PeerRole.SHARD)) as secured:
        shown = secured.getpeercert(binary_form=True)
    assert shown
    return x509.load_der_x509_certificate(shown).serial_number


def test_the_whole_system_gives_the_same_tokens_over_mutual_tls(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", "v2", seed=1)
    authority = make_authority(tmp_path / "tls")
    prompt = [5, 6, 7, 8]
    with System(folder, num_shards=2) as system:
        expected = system.greedy(prompt, 12)
    tls = {"processes": str(authority.folder), "clients": str(authority.folder / "public"), "metrics": True}
    for shared_memory_mib in (0, 64):
        workers = {"router": {"shared_memory_mib": shared_memory_mib}}
        with System(folder, num_shards=2, tls=tls, attention_workers=workers) as system:
            assert system.greedy(prompt, 12) == expected
            for address in (system.address, *(role.health().address for role in (*system.shards, *system.workers))):
                with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as raised:
                    health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
                assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
            page = metrics_page(authority, system)
            for process in ("shard-0", "shard-1", "worker-0"):
                assert f'mobula_process_up{{process="{process}"}} 1.0' in page
                role = process.partition("-")[0]
                assert f'mobula_certificate_expiry_timestamp_seconds{{process="{process}",role="{role}"}}' in page
            assert 'mobula_certificate_expiry_timestamp_seconds{process="gateway-0",role="public"}' in page
            authority.issue_roles(days=1)  # while it serves
            assert system.greedy(prompt, 12) == expected


def metrics_page(authority: Authority, system: System) -> str:
    believing = ssl.create_default_context(cafile=authority.folder / "public" / "ca.crt")
    address = system.gateway.health().metrics_address
    return get(address, "/metrics", TIMEOUT_S, 10_000_000, (believing, "localhost")).decode()


def _serial(path: Path) -> int:
    return x509.load_pem_x509_certificate(path.read_bytes()).serial_number
