"""The controller's gRPC server: an operator's calls, which the gateway relays. No logic.

A plan takes seconds for a large model, so it is computed in a thread of its own, one call after another; the status is
answered meanwhile. Knows nothing of Ray, nor of rights: gateways check them, and under mutual TLS only they may call.
"""

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import grpc
import grpc.aio

from cluster.controller.admin_messages import rebalance_message, status_message
from cluster.controller.membership import MemberChange
from cluster.controller.process import ClusterStatus, RoleName
from cluster.controller.rebalance import RebalancePlan
from protos import admin_pb2, errors, rpc
from protos.credentials import PLAINTEXT, Credentials, PeerRole
from protos.loop_thread import LoopThread
from router.trace.trace import ExpertIds

SERVICE = admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name
STOP_TIMEOUT_S = 5.0
ROLES: Mapping[int, RoleName] = {
    admin_pb2.PROCESS_ROLE_SHARD: RoleName.SHARD,
    admin_pb2.PROCESS_ROLE_WORKER: RoleName.WORKER,
    admin_pb2.PROCESS_ROLE_GATEWAY: RoleName.GATEWAY,
}
T = TypeVar("T")


class AdminController(Protocol):
    """What the calls need of a controller. Its methods are called from any thread."""

    def status(self) -> ClusterStatus:
        """The system now; does not wait."""

    def plan_rebalance(self) -> RebalancePlan:
        """What a rebalance would do. Raises MobulaError when it cannot be said."""

    def rebalance(self) -> RebalancePlan:
        """Begins one and returns what it will do. Raises MobulaError when it cannot begin."""

    def scale_shards(self, count: int) -> MemberChange:
        """From now on that many shards. Raises MobulaError when that cannot be."""

    def scale_workers(self, count: int) -> MemberChange:
        """From now on that many workers. Raises MobulaError when that cannot be."""

    def drain_shard(self, ep_rank: int) -> MemberChange:
        """The shard gives up its units and ends. Raises MobulaError when that cannot be."""

    def drain_worker(self, dp_rank: int) -> None:
        """The worker hands its requests over and ends. Raises MobulaError when that cannot be."""

    def sample_choices(self) -> tuple[bytes, list[tuple[int, ExpertIds]]]:
        """A trace's header as JSON, and by dp_rank which experts tokens chose since this was asked last."""

    def restart(self, role: RoleName, rank: int) -> None:
        """Another generation takes the process's place. Raises MobulaError when that cannot be."""


class AdminServicer:
    """The Admin service over raw bytes."""

    def __init__(self, controller: AdminController, planner: ThreadPoolExecutor) -> None:
        self._controller = controller
        self._planner = planner

    def handlers(self) -> grpc.GenericRpcHandler:
        methods = {
            "GetStatus": self.get_status,
            "Rebalance": self.rebalance,
            "ScaleShards": self.scale_shards,
            "ScaleWorkers": self.scale_workers,
            "Drain": self.drain,
            "Restart": self.restart,
            "SampleChoices": self.sample_choices,
        }
        handlers = {name: rpc.unary_handler(method) for name, method in methods.items()}
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    async def get_status(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """Admin.GetStatus."""
        rpc.parse(admin_pb2.GetStatusRequest, request)
        return bytes(status_message(self._controller.status()).SerializeToString())

    async def rebalance(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """Admin.Rebalance. A caller that leaves while it waits for its turn asked for nothing; later it is done."""
        is_dry_run = rpc.parse(admin_pb2.RebalanceRequest, request).dry_run
        method = self._controller.plan_rebalance if is_dry_run else self._controller.rebalance
        plan = await self._planned(method)
        return bytes(rebalance_message(plan, is_dry_run=is_dry_run).SerializeToString())

    async def scale_shards(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """Admin.ScaleShards."""
        count = rpc.parse(admin_pb2.ScaleShardsRequest, request).count
        change = await self._planned(self._controller.scale_shards, count)
        response = admin_pb2.ScaleShardsResponse(added_ep_ranks=change.added, drained_ep_ranks=change.drained)
        return bytes(response.SerializeToString())

    async def scale_workers(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """Admin.ScaleWorkers."""
        count = rpc.parse(admin_pb2.ScaleWorkersRequest, request).count
        change = await self._planned(self._controller.scale_workers, count)
        response = admin_pb2.ScaleWorkersResponse(added_dp_ranks=change.added, drained_dp_ranks=change.drained)
        return bytes(response.SerializeToString())

    async def drain(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """Admin.Drain."""
        asked = rpc.parse(admin_pb2.DrainRequest, request)
        if asked.role == admin_pb2.PROCESS_ROLE_SHARD:
            await self._planned(self._controller.drain_shard, asked.rank)
        elif asked.role == admin_pb2.PROCESS_ROLE_WORKER:
            await self._planned(self._controller.drain_worker, asked.rank)
        else:
            raise errors.InvalidRequest(
                f"role is {asked.role}, only shards (1) and workers (2) can be drained", field="role"
            )
        return bytes(admin_pb2.DrainResponse().SerializeToString())

    async def restart(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """Admin.Restart."""
        asked = rpc.parse(admin_pb2.RestartRequest, request)
        if asked.role not in ROLES:
            raise errors.InvalidRequest(f"role is {asked.role}, must be one of {sorted(ROLES)}", field="role")
        await self._planned(self._controller.restart, ROLES[asked.role], asked.rank)
        return bytes(admin_pb2.RestartResponse().SerializeToString())

    async def sample_choices(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """Admin.SampleChoices."""
        rpc.parse(admin_pb2.SampleChoicesRequest, request)
        header_json, choices = await self._planned(self._controller.sample_choices)
        response = admin_pb2.SampleChoicesResponse(header_json=header_json)
        for dp_rank, topk_ids in choices:
            data = topk_ids.astype(topk_ids.dtype.newbyteorder("<")).tobytes()
            response.choices.add(dp_rank=dp_rank, num_tokens=topk_ids.shape[1], topk_ids=data)
        return bytes(response.SerializeToString())

    async def _planned(self, method: Callable[..., T], *args: object) -> T:
        """What a call to the controller that may compute a placement returns."""
        return await asyncio.get_running_loop().run_in_executor(self._planner, method, *args)


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
