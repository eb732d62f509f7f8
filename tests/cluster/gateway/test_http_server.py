"""A process's HTTP port: over TLS with its role's certificate, and under clients that mean no good."""

import http.client
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography import x509
from prometheus_client import CollectorRegistry, Gauge, generate_latest, make_wsgi_app

from cluster.gateway.http_server import MAX_CONNECTIONS, Secure, get, serve_http
from cluster.gateway.metrics import GatewayMetrics
from cluster.security.authority import Authority
from cluster.security.http_tls import PROCESS_READERS, client_contexts, secured_connections
from protos.certificates import CertificateFolder
from protos.credentials import PeerRole
from protos.mutual_tls import role_name
from tests.certificates import make_authority, role_folder

HOST = "127.0.0.1"
TIMEOUT_S = 5.0


@contextmanager
def served(secure: Secure | None = None) -> Iterator[str]:
    registry = CollectorRegistry()
    Gauge("mobula_test", "Test.", registry=registry).set(7)
    server, port = serve_http(HOST, 0, make_wsgi_app(registry), secure)
    try:
        yield f"{HOST}:{port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return make_authority(tmp_path / "tls")


def guarded(authority: Authority, role: PeerRole) -> Secure:
    return secured_connections(role_folder(authority, role), is_mutual=True, readers=PROCESS_READERS)


def test_the_gateway_scrapes_processes_over_tls_and_believes_only_their_role(authority: Authority) -> None:
    metrics = GatewayMetrics()
    metrics.processes.make_context = client_contexts(role_folder(authority, PeerRole.GATEWAY))
    with served(guarded(authority, PeerRole.SHARD)) as address:
        metrics.processes.targets = {"shard-0": address, "worker-0": address}  # the second one is not what it says
        metrics.processes.targets["gateway-1"] = address  # shows what clients see: not collected here
        page = generate_latest(metrics.of_all).decode()
    assert "gateway-1" not in page
    assert "mobula_test 7.0" in page
    assert 'mobula_process_up{process="shard-0"} 1.0' in page
    assert 'mobula_process_up{process="worker-0"} 0.0' in page


def test_who_shows_no_certificate_gets_no_page(authority: Authority) -> None:
    believing = ssl.create_default_context(cafile=authority.folder / "shard" / "ca.crt")
    with served(guarded(authority, PeerRole.SHARD)) as address:
        with pytest.raises((OSError, http.client.HTTPException)):
            get(address, "/metrics", TIMEOUT_S, 10_000, (believing, role_name(PeerRole.SHARD)))
        with pytest.raises((OSError, http.client.HTTPException)):
            get(address, "/metrics", TIMEOUT_S, 10_000, None)


def test_only_those_who_may_read_get_a_page_and_no_longer_when_they_are_revoked(authority: Authority) -> None:
    authority.issue(authority.folder / "clients" / "anna", "anna", ["anna"], days=1)

    def read(shown: str) -> bytes:
        context = client_contexts(CertificateFolder(authority.folder / shown))()
        return get(address, "/metrics", TIMEOUT_S, 10_000, (context, role_name(PeerRole.SHARD)))

    with served(guarded(authority, PeerRole.SHARD)) as address:
        assert b"mobula_test" in read("metrics")
        assert b"mobula_test" in read("gateway")
        for shown in ("clients/anna", "worker"):
            with pytest.raises((OSError, http.client.HTTPException)):
                read(shown)
        revoked = x509.load_pem_x509_certificate((authority.folder / "metrics" / "tls.crt").read_bytes())
        authority.revoke(revoked)
        with pytest.raises((OSError, http.client.HTTPException)):
            read("metrics")
        assert b"mobula_test" in read("gateway")


def test_a_renewed_certificate_is_shown_to_the_next_connection(authority: Authority) -> None:
    folder = CertificateFolder(authority.folder / "public")
    believing = ssl.create_default_context(cafile=authority.folder / "public" / "ca.crt")
    with served(secured_connections(folder, is_mutual=False)) as address:
        assert b"mobula_test" in get(address, "/metrics", TIMEOUT_S, 10_000, (believing, "localhost"))
        authority.issue(folder.path, "gateway", ["renamed.example"], days=1)
        assert b"mobula_test" in get(address, "/metrics", TIMEOUT_S, 10_000, (believing, "renamed.example"))


def test_clients_that_say_nothing_keep_nobody_waiting_and_are_bounded(authority: Authority) -> None:
    for secure in (None, guarded(authority, PeerRole.SHARD)):
        with served(secure) as address:
            host, port = address.split(":")
            silent = [socket.create_connection((host, int(port)), TIMEOUT_S) for _ in range(MAX_CONNECTIONS - 1)]
            tls = None
            if secure:
                tls = client_contexts(role_folder(authority, PeerRole.GATEWAY))(), role_name(PeerRole.SHARD)
            assert b"mobula_test" in get(address, "/metrics", TIMEOUT_S, 10_000, tls)
            more = [socket.create_connection((host, int(port)), TIMEOUT_S) for _ in range(4)]
            closed = [connection for connection in more if is_closed_at_once(connection)]
            assert len(closed) >= 3  # whichever comes first has the last place, if the one above has left it
            for connection in (*silent, *more):
                connection.close()


def is_closed_at_once(connection: socket.socket) -> bool:
    """Well before the server's own patience is over."""
    connection.settimeout(TIMEOUT_S / 4)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False


def test_nonsense_leaves_no_line_in_the_log(capfd: pytest.CaptureFixture[str]) -> None:
    with served() as address:
        for nonsense in (b"PRI * HTTP/2.0\r\n\r\n", b"GET / HTTP/9\r\n\r\n", b"\x00\xff\r\n\r\n"):
            host, _, port = address.rpartition(":")
            with socket.create_connection((host, int(port)), TIMEOUT_S) as connection:
                connection.sendall(nonsense)
                assert connection.recv(64).startswith((b"HTTP/1.", b"<!DOCTYPE"))
        get(address, "/metrics", TIMEOUT_S, 2**20, None)
    assert capfd.readouterr().err == ""
