"""TLS of HTTP ports with the certificates that gRPC shows: contexts are made anew when the files change."""

import socket
import ssl
from collections.abc import Callable, Collection

from cryptography import x509

from protos.certificates import CHAIN, KEY, CertificateFolder, dns_names
from protos.credentials import PeerRole
from protos.mutual_tls import role_name

READER_NAME = "metrics.mobula.internal"  # in the certificate of who may read every process's series, and nothing else
PROCESS_READERS = frozenset({role_name(PeerRole.GATEWAY), READER_NAME})


class HttpCertificateRefused(OSError):
    """Of a client: revoked, or not of those who are served."""


def secured_connections(
    folder: CertificateFolder, *, is_mutual: bool, readers: Collection[str] = ()
) -> Callable[[socket.socket], ssl.SSLSocket]:
    """What a server makes of each connection; it blocks until the handshake is done.

    is_mutual: clients need a certificate of an authority in `ca.crt`, which is not in its `ca.crl`. readers: DNS names,
    of which it must carry one; none for any. What is returned raises OSError, and HttpCertificateRefused among them.
    """
    contexts = _Contexts(folder, ssl.PROTOCOL_TLS_SERVER, is_verifying=is_mutual)

    def secured(connection: socket.socket) -> ssl.SSLSocket:
        wrapped = contexts.newest().wrap_socket(connection, server_side=True)
        try:
            if is_mutual:
                _check(wrapped, folder, readers)
        except BaseException:
            wrapped.close()
            raise
        return wrapped

    return secured


def client_contexts(folder: CertificateFolder) -> Callable[[], ssl.SSLContext]:
    """What a client asks for each connection; servers need a certificate of an authority in `ca.crt`."""
    return _Contexts(folder, ssl.PROTOCOL_TLS_CLIENT, is_verifying=True).newest


def _check(connection: ssl.SSLSocket, folder: CertificateFolder, readers: Collection[str]) -> None:
    shown = connection.getpeercert(binary_form=True)
    try:
        if shown is None or folder.current().has_revoked(ssl.DER_cert_to_PEM_cert(shown).encode()):
            raise HttpCertificateRefused("the certificate is revoked")
        if readers and dns_names(x509.load_der_x509_certificate(shown)).isdisjoint(readers):
            raise HttpCertificateRefused(f"the certificate carries none of {', '.join(sorted(readers))}")
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise HttpCertificateRefused(f"the certificate cannot be read: {error}") from error


class _Contexts:
    def __init__(self, folder: CertificateFolder, protocol: int, *, is_verifying: bool) -> None:
        self._folder = folder
        self._protocol = protocol
        self._is_verifying = is_verifying
        self._made: tuple[int, ssl.SSLContext] | None = None

    def newest(self) -> ssl.SSLContext:
        """From any thread."""
        shown = self._folder.current()
        made = self._made
        if made is None or made[0] != shown.version:
            context = ssl.SSLContext(self._protocol)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.load_cert_chain(self._folder.path / CHAIN, self._folder.path / KEY)
            if self._is_verifying:
                context.load_verify_locations(cadata=shown.authority.decode("ascii"))
                context.verify_mode = ssl.CERT_REQUIRED
            self._made = made = (shown.version, context)
        return made[1]
