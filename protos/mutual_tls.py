"""TLS: between processes, where both ends show a certificate of their role, and on the port that clients reach.

A role is a DNS name in the certificate, ROLE.mobula.internal. A client checks that the server carries the name of the
role it means to call; a server checks that the caller carries one of the roles that it serves, before any method but a
health check runs. Certificates are read again when their files change: for each new connection on a server, for each
new call of a client. Connections that are open stay so.
"""

from collections.abc import Callable, Sequence

import grpc
import grpc.aio

from protos.certificates import CertificateFolder
from protos.credentials import Options, PeerRole, make_server
from protos.errors import PermissionDenied, Unauthenticated
from protos.guard import HEALTH_PREFIX, Check, Guard
from protos.rotating_channel import RotatingChannel


def role_name(role: PeerRole) -> str:
    """The DNS name that a certificate of the role carries."""
    return f"{role.value}.mobula.internal"


class MutualTls:
    """Implements Credentials with the certificate of one role."""

    def __init__(self, folder: CertificateFolder) -> None:
        self._folder = folder

    def channel(self, address: str, peer: PeerRole, options: Options) -> grpc.aio.Channel:
        """See Credentials."""
        named = [*options, ("grpc.ssl_target_name_override", role_name(peer))]

        def make() -> grpc.aio.Channel:
            shown = self._folder.current()
            credentials = grpc.ssl_channel_credentials(shown.authority, shown.key, shown.chain)
            return grpc.aio.secure_channel(address, credentials, options=named)

        return RotatingChannel(make, lambda: self._folder.current().version)

    def server(
        self,
        accepted: Sequence[PeerRole],
        options: Options,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    ) -> grpc.aio.Server:
        """See Credentials."""
        guard = Guard(accept_roles(self._folder, accepted))
        return make_server(options, [guard, *interceptors])

    def listen(self, server: grpc.aio.Server, address: str) -> int:
        """See Credentials."""
        return _listen(server, address, self._folder, is_mutual=True)


class ServerTls:
    """Implements ServerCredentials for clients: they need a certificate only if `is_mutual`."""

    def __init__(self, folder: CertificateFolder, *, is_mutual: bool) -> None:
        self._folder = folder
        self._is_mutual = is_mutual

    def server(
        self,
        accepted: Sequence[PeerRole],
        options: Options,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    ) -> grpc.aio.Server:
        """See ServerCredentials. Clients have no role, so `accepted` is empty."""
        assert not accepted
        guards = [Guard(accept_unrevoked(self._folder))] if self._is_mutual else []
        return make_server(options, [*guards, *interceptors])

    def listen(self, server: grpc.aio.Server, address: str) -> int:
        """See ServerCredentials."""
        return _listen(server, address, self._folder, is_mutual=self._is_mutual)


def accept_roles(folder: CertificateFolder, accepted: Sequence[PeerRole]) -> Check:
    """A check that raises PermissionDenied for certificates of other roles, Unauthenticated for revoked ones."""
    names = {role_name(role).encode() for role in accepted}
    is_revoked = accept_unrevoked(folder)

    def check(method: str, context: grpc.aio.ServicerContext) -> None:
        is_revoked(method, context)
        shown = set(context.auth_context().get("x509_subject_alternative_name", ()))
        if not shown & names and not method.startswith(HEALTH_PREFIX):
            raise PermissionDenied(
                f"the certificate is of {_printable(shown)}, this server takes calls of {_printable(names)}"
            )

    return check


def accept_unrevoked(folder: CertificateFolder) -> Check:
    """A check that raises Unauthenticated for a certificate that is revoked."""

    def check(method: str, context: grpc.aio.ServicerContext) -> None:
        for pem in context.auth_context().get("x509_pem_cert", ()):
            if folder.current().has_revoked(pem):
                raise Unauthenticated("the certificate is revoked; get a new one")

    return check


def _printable(names: set[bytes]) -> str:
    """Bounded: a certificate may carry thousands."""
    return ", ".join(sorted(name.decode("ascii", "replace")[:80] for name in names)[:4]) or "nobody"


def _listen(server: grpc.aio.Server, address: str, folder: CertificateFolder, *, is_mutual: bool) -> int:
    renewed = _renewed_configuration(folder, is_mutual=is_mutual)
    first = renewed()
    assert first
    return int(server.add_secure_port(address, grpc.dynamic_ssl_server_credentials(first, renewed, is_mutual)))


def _renewed_configuration(
    folder: CertificateFolder, *, is_mutual: bool
) -> Callable[[], grpc.ServerCertificateConfiguration | None]:
    """What gRPC asks before each handshake: the configuration if it is another, else None."""
    version = 0

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal version
        shown = folder.current()
        if shown.version == version:
            return None
        version = shown.version
        authority = shown.authority if is_mutual else None
        return grpc.ssl_server_certificate_configuration([(shown.key, shown.chain)], authority)

    return renewed
