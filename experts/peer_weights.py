"""Copies experts from other shards, over the calls that they serve. Knows nothing of placements.

A copy costs neither the reading of a checkpoint nor its packing. Where it fails, the checkpoint still has the weights.
"""

import logging
from collections.abc import Mapping
from concurrent.futures import CancelledError
from contextlib import suppress

import grpc
import grpc.aio

from experts.weight_frames import CopyError, ExpertCopy
from experts.weight_store import Expert, ExpertModel, OnRead, Unit
from protos import expert_pb2, rpc
from protos.credentials import Credentials, PeerRole
from protos.loop_thread import LoopThread

logger = logging.getLogger(__name__)

FRAME_TIMEOUT_S = 10.0  # for the next frame, which a shard that is well sends at once
MAX_SLOWNESS = 4.0  # times as long as the rate says; then the copy is given up


class PeerWeights:
    """For one reading of units, in one thread; the calls run on a loop in another. Leaving the block closes them."""

    def __init__(
        self,
        loop: LoopThread,
        credentials: Credentials,
        model: ExpertModel,
        sources: Mapping[Unit, str],
        max_bytes_per_s: float,
    ) -> None:
        """sources: host:port of a shard that has the unit."""
        self._loop = loop
        self._credentials = credentials
        self._model = model
        self._sources = dict(sources)
        self._timeout_s = FRAME_TIMEOUT_S + MAX_SLOWNESS * 2 * model.expert_bytes / max_bytes_per_s
        self._channels: dict[str, grpc.aio.Channel] = {}

    def __enter__(self) -> "PeerWeights":
        return self

    def __exit__(self, *_: object) -> None:
        for address, channel in self._channels.items():
            try:
                self._loop.run(channel.close(grace=0), FRAME_TIMEOUT_S)
            except TimeoutError:  # what was read is whole all the same
                logger.warning("the connection to %s does not close", address)

    def copy(self, unit: Unit, expert_id: int, on_read: OnRead | None) -> Expert | None:
        """The expert as the unit's source has it; None without one, or where it failed, which is then asked no more."""
        address = self._sources.get(unit)
        if address is None:
            return None
        try:
            return self._copy(address, unit.layer_id, expert_id, on_read)
        except (CopyError, grpc.RpcError, TimeoutError, CancelledError) as error:
            reason = error.code().name if isinstance(error, grpc.aio.AioRpcError) else repr(error)
            logger.warning(
                "layer %d expert %d could not be copied from %s: %s; it is read from the checkpoint, as all that was "
                "to come from there",
                unit.layer_id,
                expert_id,
                address,
                reason,
            )
            self._sources = {unit: source for unit, source in self._sources.items() if source != address}
            return None

    def _copy(self, address: str, layer_id: int, expert_id: int, on_read: OnRead | None) -> Expert:
        call = self._loop.run(self._call(address, layer_id, expert_id), FRAME_TIMEOUT_S)
        whole = ExpertCopy(self._model)
        try:
            while (frame := self._loop.run(_next_frame(call), FRAME_TIMEOUT_S)) is not None:
                num_bytes = whole.add(frame)
                if on_read:
                    on_read(num_bytes)
        finally:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.loop.call_soon_threadsafe(call.cancel)  # the call belongs to the loop's thread
        return whole.expert()

    async def _call(self, address: str, layer_id: int, expert_id: int) -> grpc.aio.UnaryStreamCall:
        if address not in self._channels:
            self._channels[address] = self._credentials.channel(address, PeerRole.SHARD, rpc.frame_options())
        method = self._channels[address].unary_stream("/mobula.v1.ExpertShard/CopyExpert")
        request = expert_pb2.CopyExpertRequest(layer_id=layer_id, expert_id=expert_id)
        return method(request.SerializeToString(), timeout=self._timeout_s)


async def _next_frame(call: grpc.aio.UnaryStreamCall) -> bytes | None:
    data = await call.read()
    return None if data is grpc.aio.EOF else bytes(data)
