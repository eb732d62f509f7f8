"""What a command says when its gateway and it do not agree on TLS, or nobody listens."""

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, make_wsgi_app

from cluster.client_access import ClientAccess
from cluster.commands.generate_command import wait_until_listening
from cluster.commands.reachability import why_unreachable
from cluster.gateway.http_server import close_http, serve_http
from cluster.security.authority import Authority
from cluster.security.http_tls import secured_connections
from protos.certificates import CertificateFolder
from protos.credentials import PLAINTEXT, ServerCredentials
from protos.mutual_tls import ServerTls
from tests.certificates import HOST, make_authority
from tests.fake_controller import gateway_host


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    authority = make_authority(tmp_path / "tls")
    authority.issue(authority.folder / "clients" / "ann", "ann", (), days=1)
    return authority


@contextmanager
def listening(front: ServerCredentials) -> Iterator[str]:
    with gateway_host(front, []) as host:
        yield host.address


def believing(authority: Authority, shown: Path | None = None) -> ClientAccess:
    return ClientAccess(
        is_tls=True,
        authority=(authority.folder / "public" / "ca.crt").read_bytes(),
        certificate=(shown / "tls.crt").read_bytes() if shown else None,
        private_key=(shown / "tls.key").read_bytes() if shown else None,
    )


def test_plaintext_to_a_gateway_with_tls_names_the_option_that_is_missing(authority: Authority) -> None:
    with listening(ServerTls(CertificateFolder(authority.folder / "public"), is_mutual=False)) as address:
        reason = why_unreachable(address, ClientAccess())
        assert reason
        assert reason.startswith(f"{address} speaks TLS and was called in plaintext; give --tls-ca")
        assert why_unreachable(address, believing(authority)) is None


def test_tls_to_a_gateway_in_plaintext_names_the_options_to_leave_out(authority: Authority) -> None:
    with listening(PLAINTEXT) as address:
        reason = why_unreachable(address, believing(authority))
        assert reason
        assert f"{address} was called with TLS and does not speak it; leave out --tls" in reason
        assert "tls.clients" in reason
        assert why_unreachable(address, ClientAccess()) is None


def test_an_authority_that_did_not_sign_the_certificate_is_told(authority: Authority, tmp_path: Path) -> None:
    other = make_authority(tmp_path / "other")
    with listening(ServerTls(CertificateFolder(authority.folder / "public"), is_mutual=False)) as address:
        reason = why_unreachable(address, believing(other))
        assert reason
        assert f"the certificate of {address} is not to be believed" in reason
        assert "--tls-ca" in reason


def test_a_certificate_for_another_name_says_which_names_it_has(authority: Authority, tmp_path: Path) -> None:
    authority.issue(tmp_path / "elsewhere", "gateway", ["gateway.example"], days=1)
    with listening(ServerTls(CertificateFolder(tmp_path / "elsewhere"), is_mutual=False)) as address:
        reason = why_unreachable(address, believing(authority))
        assert reason
        assert f"is for gateway.example, not for {HOST}" in reason
        assert f"mobula certs make FOLDER --name {HOST}" in reason


def test_a_gateway_that_wants_a_clients_certificate_says_which_options_give_it(
    authority: Authority, tmp_path: Path
) -> None:
    with listening(ServerTls(CertificateFolder(authority.folder / "public"), is_mutual=True)) as address:
        reason = why_unreachable(address, believing(authority))
        assert reason
        assert reason == (f"{address} wants a client's certificate; give --cert FILE and --key FILE before the command")
        stranger = make_authority(tmp_path / "other")
        stranger.issue(tmp_path / "bob", "bob", (), days=1)
        refused = why_unreachable(address, believing(authority, tmp_path / "bob"))
        assert refused
        assert "does not accept the certificate of --cert" in refused
        assert why_unreachable(address, believing(authority, authority.folder / "clients" / "ann")) is None


def test_an_address_where_nobody_listens_is_told_so() -> None:
    with socket.socket() as unused:
        unused.bind((HOST, 0))
        address = f"{HOST}:{unused.getsockname()[1]}"
        reason = why_unreachable(address, ClientAccess())
    assert reason
    assert reason.startswith(f"nobody answers at {address} (Connection refused)")


@pytest.mark.parametrize(
    "address", ["gateway", "gateway:", ":50051", "gateway:port", "gateway:0", "gateway:99999", "h:²", "a..b:50051"]
)
def test_what_is_no_address_is_named(address: str) -> None:
    assert why_unreachable(address, ClientAccess()) == f"{address!r} is not host:port with a port of 1 to 65535"
    told: list[object] = []
    wait_until_listening(address, 30.0, lambda *said: told.append(said), sleep=told.append)
    assert not told  # nobody waits for what is no address


def test_an_http_port_is_not_the_one_that_is_called(authority: Authority) -> None:
    secure = secured_connections(CertificateFolder(authority.folder / "public"), is_mutual=False)
    for http_secure, access in ((None, ClientAccess()), (secure, believing(authority))):
        server, port = serve_http(HOST, 0, make_wsgi_app(CollectorRegistry()), http_secure)
        reason = why_unreachable(f"{HOST}:{port}", access)
        close_http(server)
        assert reason
        assert reason.startswith(f"{HOST}:{port} answers, and not in gRPC: is it the HTTP port")


@pytest.mark.parametrize(
    ("key", "certificate", "authority_text"),
    [("other", "ann", None), ("ann", "ann", b"no certificate"), ("ann", "ann", b"\xff\xfe")],
)
def test_files_that_do_not_fit_are_told_with_their_options(
    authority: Authority, key: str, certificate: str, authority_text: bytes | None
) -> None:
    clients = authority.folder / "clients"
    authority.issue(clients / "other", "other", (), days=1)
    access = ClientAccess(
        is_tls=True,
        authority=authority_text or (authority.folder / "public" / "ca.crt").read_bytes(),
        certificate=(clients / certificate / "tls.crt").read_bytes(),
        private_key=(clients / key / "tls.key").read_bytes(),
    )
    with listening(ServerTls(CertificateFolder(authority.folder / "public"), is_mutual=False)) as address:
        reason = why_unreachable(address, access)
    assert reason
    assert "--tls-ca is an authority's certificate, --cert and --key" in reason


def test_a_port_of_tls_1_2_that_wants_a_certificate_speaks_tls(authority: Authority) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    public = authority.folder / "public"
    context.load_cert_chain(public / "tls.crt", public / "tls.key")
    context.load_verify_locations(public / "ca.crt")
    context.verify_mode = ssl.CERT_REQUIRED
    with socket.create_server((HOST, 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                try:
                    context.wrap_socket(connection, server_side=True).close()
                except OSError:
                    connection.close()

        threading.Thread(target=serve, name="tls-1.2", daemon=True).start()
        address = f"{HOST}:{listener.getsockname()[1]}"
        reason = why_unreachable(address, believing(authority))
        listener.shutdown(socket.SHUT_RDWR)
    assert reason
    assert "wants a client's certificate" in reason
