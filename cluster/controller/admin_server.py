"""The controller's gRPC server: an operator's calls, which the gateway relays. No logic.

A plan takes seconds for a large model, so it is computed in a thread of its own, one call after another; the status is
answered meanwhile. Knows nothing of Ray; the calls have no right of their own yet, so it listens where data does.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import grpc
import grpc.aio

from cluster.controller.admin_messages import rebalance_message, status_message
from cluster.controller.process import ClusterStatus
from cluster.controller.rebalance import RebalancePlan
from protos import admin_pb2, errors, rpc
from protos.credentials import PLAINTEXT, Credentials, PeerRole
from protos.loop_thread import LoopThread

SERVICE = admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name
STOP_TIMEOUT_S = 5.0


class AdminController(Protocol):
    """What the calls need of a controller. Its methods are called from any thread."""

    def status(self) -> ClusterStatus:
        """The system now; does not wait."""

    def plan_rebalance(self) -> RebalancePlan:
        """What a rebalance would do. Raises MobulaError when it cannot be said."""

    def rebalance(self) -> RebalancePlan:
        """Begins one and returns what it will do. Raises MobulaError when it cannot begin."""


class AdminServicer:
    """The Admin service over raw bytes."""

    def __init__(self, controller: AdminController, planner: ThreadPoolExecutor) -> None:
        self._controller = controller
        self._planner = planner

    def handlers(self) -> grpc.GenericRpcHandler:
        methods = {"GetStatus": rpc.unary_handler(self.get_status), "Rebalance": rpc.unary_handler(self.rebalance)}
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    async def get_status(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """Admin.GetStatus."""
        rpc.parse(admin_pb2.GetStatusRequest, request)
        return bytes(status_message(self._controller.status()).SerializeToString())

    async def rebalance(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """Admin.Rebalance. A caller that leaves while it waits for its turn asked for nothing; later it is done."""
        is_dry_run = rpc.parse(admin_pb2.RebalanceRequest, request).dry_run
        method = self._controller.plan_rebalance if is_dry_run else self._controller.rebalance
        plan = await asyncio.get_running_loop().run_in_executor(self._planner, method)
        return bytes(rebalance_message(plan, is_dry_run=is_dry_run).SerializeToString())


class AdminServer:
    """The listening server, on an event loop of its own. Used from one thread."""

    def __init__(self, controller: AdminController, credentials: Credentials = PLAINTEXT) -> None:
        self._credentials = credentials
        self._controller = controller
        self._planner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="admin-planner")
        self._loop = LoopThread("admin")
        self._server: grpc.aio.Server | None = None

    def start(self, host: str, port: int = 0) -> str:
        """Listens; `port` 0 takes a free one. Returns host:port. Raises Unavailable when it cannot listen there."""
        bound_port = self._loop.run(self._start(host, port))
        return f"{host}:{bound_port}"

    async def _start(self, host: str, port: int) -> int:
        server = self._credentials.server((PeerRole.GATEWAY,), rpc.client_options())
        server.add_generic_rpc_handlers((AdminServicer(self._controller, self._planner).handlers(),))
        try:
            bound_port = self._credentials.listen(server, f"{host}:{port}")
        except RuntimeError as error:
            raise errors.Unavailable(
                f"controller cannot listen on {host}:{port}: the port is taken or the address is not of this machine"
            ) from error
        await server.start()
        self._server = server
        return int(bound_port)

    def stop(self) -> None:
        """Ends the calls in flight and the server; a plan that is being computed ends by itself. Safe to call twice."""
        if self._server:
            self._loop.run(self._server.stop(None), STOP_TIMEOUT_S)
            self._server = None
        self._planner.shutdown(wait=False, cancel_futures=True)
        self._loop.stop()
