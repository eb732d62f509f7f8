"""TLS of HTTP ports with the certificates that gRPC shows: contexts are made anew when the files change."""

import ssl
from collections.abc import Callable

from protos.certificates import CHAIN, KEY, CertificateFolder


def server_contexts(folder: CertificateFolder, *, is_mutual: bool) -> Callable[[], ssl.SSLContext]:
    """What a server asks for each connection. is_mutual: clients need a certificate of an authority in `ca.crt`."""
    return _Contexts(folder, ssl.PROTOCOL_TLS_SERVER, is_verifying=is_mutual).newest


def client_contexts(folder: CertificateFolder) -> Callable[[], ssl.SSLContext]:
    """What a client asks for each connection; servers need a certificate of an authority in `ca.crt`."""
    return _Contexts(folder, ssl.PROTOCOL_TLS_CLIENT, is_verifying=True).newest


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
