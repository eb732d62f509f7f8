"""Why a gateway did not answer a call: nobody listens, or the two sides do not agree on TLS.

gRPC tells it in the words of its TLS library. Here the address is tried again with Python's, one step after the other,
until one fails. No call is made.
"""

import socket
import ssl
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from cluster.client_access import ClientAccess
from cluster.host_port import host_and_port

TIMEOUT_S = 3.0  # for each step
HTTP2 = "h2"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"  # a client's, and its settings: none
SETTINGS = 4  # the type of the first frame of each side; RFC 9113, section 3.4


def why_unreachable(address: str, access: ClientAccess) -> str | None:
    """The reason and the way out; None when everything that can be tried here succeeds."""
    where = host_and_port(address.removeprefix("dns:"))
    if where is None:
        return f"{address!r} is not host:port with a port of 1 to 65535"
    host, port = where
    try:
        with socket.create_connection((host, port), TIMEOUT_S):
            pass
    except OSError as error:
        reason = error.strerror or str(error) or "no answer"
        return f"nobody answers at {address} ({reason}); is `mobula serve` running, and is this its --address?"
    speaks_tls = _speaks_tls(host, port)
    if not access.is_tls:
        if speaks_tls:
            return (
                f"{address} speaks TLS and was called in plaintext; give --tls-ca FILE before the command, the ca.crt "
                "of its tls.clients folder, or --tls where this machine believes its authority"
            )
        return None if _speaks_http2(host, port) else _not_grpc(address)
    if not speaks_tls:
        return (
            f"{address} was called with TLS and does not speak it; leave out --tls, --tls-ca and --cert (MOBULA_TLS, "
            "MOBULA_TLS_CA, MOBULA_TLS_CERT), or set tls.clients in the configuration of `mobula serve`"
        )
    return _why_not_believed(host, port, address, access)


def _speaks_tls(host: str, port: int) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols([HTTP2])
    try:
        with _connected(host, port, context):
            return True
    except ssl.SSLError as error:  # an alert is TLS: before 1.3 that is how a client's certificate is asked for
        return "ALERT" in (error.reason or "")
    except OSError:
        return False


def _speaks_http2(host: str, port: int) -> bool:
    """Without TLS. True also of one that says nothing in time: that is for gRPC to tell."""
    try:
        with socket.create_connection((host, port), TIMEOUT_S) as connection:
            connection.sendall(PREFACE)
            frame = connection.recv(4)
    except OSError:
        return True
    return len(frame) < 4 or frame[3] == SETTINGS


def _not_grpc(address: str) -> str:
    return (
        f"{address} answers, and not in gRPC: is it the HTTP port, gateway.metrics_port? --address wants gateway.port, "
        "which is 50051 unless configured"
    )


def _why_not_believed(host: str, port: int, address: str, access: ClientAccess) -> str | None:
    try:
        context = _context(access)
    except (OSError, ValueError) as error:  # ssl.SSLError is the former, what is no text the latter
        return (
            f"{address} speaks TLS, but a file that was given is not what it should be ({error}): --tls-ca is an "
            "authority's certificate, --cert and --key a certificate and its own private key, all as PEM"
        )
    context.check_hostname = False
    try:
        with _connected(host, port, context) as connection:
            if connection.selected_alpn_protocol() != HTTP2:
                return _not_grpc(address)
            names = _names(connection)
    except ssl.SSLCertVerificationError as error:
        return (
            f"the certificate of {address} is not to be believed: {error.verify_message}; give --tls-ca the ca.crt of "
            "its tls.clients folder, or FOLDER/ca.crt of `mobula certs make FOLDER`"
        )
    except ssl.SSLError:  # before TLS 1.3 a client's certificate is asked for in the handshake
        return _why_refused(host, port, address, context, access)
    except OSError:  # it answered a moment ago: that is for gRPC to tell
        return None
    if host not in names and not any(name.startswith("*.") and host.endswith(name[1:]) for name in names):
        return (
            f"the certificate of {address} is for {', '.join(names) or 'no name'}, not for {host}; call it by one of "
            f"those names, or make one with `mobula certs make FOLDER --name {host}`"
        )
    return _why_refused(host, port, address, context, access)


def _names(connection: ssl.SSLSocket) -> list[str]:
    """That the other side's certificate is for."""
    alternatives: Any = (connection.getpeercert() or {}).get("subjectAltName", ())
    return [name for _, name in alternatives]


def _why_refused(host: str, port: int, address: str, context: ssl.SSLContext, access: ClientAccess) -> str | None:
    """What the other side thinks of our certificate: in TLS 1.3 it says so, or hangs up, only after the handshake."""
    with suppress(OSError), _connected(host, port, context) as connection:  # an alert, or a connection that was reset
        if connection.recv(1):  # HTTP/2 begins with the server's settings
            return None
    if access.certificate:
        return f"{address} does not accept the certificate of --cert: expired, or of an authority that is not its own"
    return f"{address} wants a client's certificate; give --cert FILE and --key FILE before the command"


def _connected(host: str, port: int, context: ssl.SSLContext) -> ssl.SSLSocket:
    """After the handshake. Raises OSError."""
    connection = socket.create_connection((host, port), TIMEOUT_S)
    try:
        return context.wrap_socket(connection, server_hostname=host)
    except BaseException:
        connection.close()
        raise


def _context(access: ClientAccess) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=access.authority.decode("ascii") if access.authority else None)
    context.set_alpn_protocols([HTTP2])
    if access.certificate and access.private_key:
        with tempfile.TemporaryDirectory() as folder:  # the ssl module takes certificates from files alone
            path = Path(folder) / "both.pem"
            path.touch(mode=0o600)
            path.write_bytes(access.private_key + b"\n" + access.certificate)
            context.load_cert_chain(path)
    return context
