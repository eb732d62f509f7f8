"""What an HTTP port does with a client whose certificate is of its authority and cannot be read."""

import socket
import ssl
import threading
from pathlib import Path

import pytest
from cryptography import x509

from cluster.security.http_tls import PROCESS_READERS, HttpCertificateRefused, secured_connections
from protos.credentials import PeerRole
from tests.certificates import make_authority, role_folder

TIMEOUT_S = 5.0
ADDRESS_OF_THREE_BYTES = b"\x30\x05\x87\x03\x7f\x00\x01"  # a SubjectAlternativeName that OpenSSL lets through


def test_a_certificate_that_cannot_be_read_is_refused_and_its_connection_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = make_authority(tmp_path / "tls")
    shown = authority.folder / "clients" / "odd"
    with monkeypatch.context() as patch:
        names = x509.UnrecognizedExtension(x509.SubjectAlternativeName.oid, ADDRESS_OF_THREE_BYTES)
        patch.setattr("cluster.security.authority.x509.SubjectAlternativeName", lambda _: names)
        authority.issue(shown, "odd", ["odd"], days=1)
    secured = secured_connections(role_folder(authority, PeerRole.SHARD), is_mutual=True, readers=PROCESS_READERS)
    context = ssl.create_default_context(cafile=shown / "ca.crt")
    context.check_hostname = False
    context.load_cert_chain(shown / "tls.crt", shown / "tls.key")
    ours, theirs = socket.socketpair()
    for side in (ours, theirs):
        side.settimeout(TIMEOUT_S)
    received: list[bytes] = []

    def call() -> None:
        with context.wrap_socket(theirs) as connection:
            try:
                received.append(connection.recv(1))
            except ConnectionError:  # closed with what it had sent unread
                received.append(b"")

    client = threading.Thread(target=call, name="client", daemon=True)
    client.start()
    with pytest.raises(HttpCertificateRefused, match="cannot be read"):
        secured(ours)
    client.join(TIMEOUT_S)
    assert received == [b""]
