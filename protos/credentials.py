"""Every gRPC channel and every server of the system's processes is made here: who may talk to whom, and how a
connection is protected. Plaintext until a deployment has certificates. Knows nothing of what the calls say.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Protocol

import grpc
import grpc.aio

Options = Sequence[tuple[str, int]]

_LIMITS = [  # of every server; messages have their own, by what they carry (protos/rpc.py)
    ("grpc.so_reuseport", 0),  # a port that is taken is an error
    ("grpc.max_metadata_size", 16 * 1024),  # of one call, in bytes
    ("grpc.absolute_max_metadata_size", 32 * 1024),
    ("grpc.max_allowed_incoming_connections", 4096),
    ("grpc.server_handshake_timeout_ms", 10_000),  # for those who connect and say nothing
]


def make_server(options: Options, interceptors: Sequence[grpc.aio.ServerInterceptor]) -> grpc.aio.Server:
    """A server with the limits of all where `options` has no other. For implementations of ServerCredentials."""
    chosen = {**dict(_LIMITS), **dict(options)}  # of two values gRPC would take the first
    return grpc.aio.server(interceptors=list(interceptors), options=list(chosen.items()))


class PeerRole(StrEnum):
    """Who is at the other end of a connection between processes."""

    SHARD = "shard"
    WORKER = "worker"
    GATEWAY = "gateway"
    CONTROLLER = "controller"


class ServerCredentials(Protocol):
    """What a server shows to those who call it, and what it asks of them."""

    def server(
        self,
        accepted: Sequence[PeerRole],
        options: Options,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    ) -> grpc.aio.Server:
        """A server that takes calls of these roles only; not listening yet."""

    def listen(self, server: grpc.aio.Server, address: str) -> int:
        """Binds a server of `server` to "host:port" and returns the port. Raises RuntimeError when it cannot."""


class Credentials(ServerCredentials, Protocol):
    """What one process shows to others, and what it asks of them."""

    def channel(self, address: str, peer: PeerRole, options: Options) -> grpc.aio.Channel:
        """To the process at `address` ("host:port"), which must be a `peer`."""


class Plaintext:
    """No protection: for one machine or a trusted network. Every role is believed."""

    def channel(self, address: str, peer: PeerRole, options: Options) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(address, options=list(options))

    def server(
        self,
        accepted: Sequence[PeerRole],
        options: Options,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    ) -> grpc.aio.Server:
        return make_server(options, interceptors)

    def listen(self, server: grpc.aio.Server, address: str) -> int:
        return int(server.add_insecure_port(address))


PLAINTEXT: Credentials = Plaintext()
