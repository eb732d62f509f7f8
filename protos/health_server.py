"""Health for probes that speak no TLS, as Kubernetes' do: grpc.health.v1 alone, in plaintext, on a port of its own."""

import grpc.aio
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from protos import rpc
from protos.credentials import PLAINTEXT
from protos.errors import Unavailable


async def serve_health(health: health_aio.HealthServicer, host: str, port: int) -> grpc.aio.Server:
    """Says what `health` says. Raises Unavailable when it cannot listen there."""
    server = PLAINTEXT.server((), rpc.client_options())
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    try:
        PLAINTEXT.listen(server, f"{host}:{port}")
    except RuntimeError as error:
        raise Unavailable(
            f"cannot listen on {host}:{port}: the port is taken or the address is not of this machine; set another "
            "health_port"
        ) from error
    await server.start()
    return server
