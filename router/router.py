"""Sends each token's hidden state to the shards that hold its experts, and adds what comes back.

A library inside the attention worker. Knows nothing of weights, of how shards are found, or of what a transport is made
of. Implements attention.decoder.ExpertDispatcher.

The life of a layer's rows:
1. `dispatch` takes the newest Routing (expert map and transports) and chooses a replica of each unit.
2. The plan: each row once a shard, assignments sorted, partial sums numbered.
3. One frame to each shard; `dispatch` returns while they are on their way. Several handles may be in flight.
4. `combine` waits for the answers, has failed ones sent again, and adds each row's partial sums in order of their unit.
"""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Mapping

from torch import Tensor

from protos.errors import Unavailable
from protos.poller import Poller
from router.attempt import LayerInput
from router.completions import Completions
from router.dispatch_handle import DispatchHandle
from router.expert_map import ExpertMap
from router.gate_config import GateConfig
from router.handle_context import HandleContext
from router.metrics import DispatchStats, RouterMetrics
from router.router_config import RouterConfig
from router.routing import Candidates, Routing
from router.shard_ledger import ShardLedger
from router.step_limit import StepLimit
from router.transport import ShardTransport, TransportFactory
from router.unit_trust import WrongUnit

logger = logging.getLogger(__name__)

_CONNECT_POLL_S = 0.01


class Router:
    """`dispatch` and `combine` belong to the engine thread; every other method may be called from any thread."""

    def __init__(
        self,
        *,
        config: RouterConfig,
        gate: GateConfig,
        expert_map: ExpertMap,
        addresses: Mapping[int, str],
        connect: TransportFactory,
        metrics: RouterMetrics,
        poller: Poller | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`addresses` by ep_rank, without those that are down; `connect` opens the way to one.

        poller: where the engine thread waits, for transports that have a socket of their own in it.
        """
        self._gate = gate
        self._connect = connect
        self._metrics = metrics
        self._update_lock = threading.Lock()
        self._routing = self._routing_of(expert_map, (None,) * expert_map.ep_size)
        self._is_closed = False
        self._step_limit = StepLimit()
        self._judged_routing = self._routing  # whose shards the ledger knows
        ledger = self._ledger = ShardLedger(config, metrics, clock)
        metrics.watch(self.quarantined_shards, ledger.trust.report)
        self._context = HandleContext(
            config=config,
            metrics=metrics,
            completions=Completions(poller or Poller()),
            routing=self._newest_routing,
            sequence_numbers=itertools.count(1),  # unique within each stream; 0 means unset on the wire
            candidates=Candidates(
                turns=itertools.count(),
                queues=ledger.queues,
                health=ledger.health,
                trust=ledger.trust,
                late_after_s=config.late_after_s,
            ),
            handles_by_version={},
            ledger=ledger,
            clock=clock,
        )
        self.update_placement(expert_map, addresses)

    @property
    def expert_map(self) -> ExpertMap:
        """The newest."""
        return self._routing.expert_map

    @property
    def oldest_placement_version(self) -> int:
        """Under which a handle is in flight, or else the newest."""
        return min([*tuple(self._context.handles_by_version), self.expert_map.placement_version])

    def dispatch(self, layer_id: int, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> DispatchHandle:
        """Sends the rows to their experts and returns at once.

        hidden_states: [num_tokens, hidden_size] fp32 or bf16, not to be changed until combined;
        topk_weights: [num_tokens, top_k] fp32; topk_ids: [num_tokens, top_k] int64, no duplicates within a row but for
        NO_EXPERT, which asks for nothing.
        """
        layer = LayerInput(
            layer_id=layer_id,
            hidden_states=_on_cpu(hidden_states),
            topk_weights=_on_cpu(topk_weights),
            topk_ids=_on_cpu(topk_ids),
        )
        handle = DispatchHandle(layer, self._context, hidden_states.device, self._step_limit)
        try:
            handle.start()
        except BaseException:
            handle.abandon()  # what was sent already is nobody's answer
            raise
        self._metrics.count_dispatch(handle.plan.num_tokens_by_ranks, handle.max_ranks_per_token)
        return handle

    def combine(self, handle: DispatchHandle) -> Tensor:
        """The weighted sum of each row's routed experts: [num_tokens, hidden_size] fp32.

        The same to the bit wherever the experts are. Raises ShardUnavailable when a shard and its replicas did not
        answer within forward_timeout_s, DeadlineExceeded or Cancelled when nobody waits any more, InternalError when a
        shard refused the message.
        """
        assert not handle.is_combined, "a handle is combined once"
        handle.is_combined = True
        combined = handle.wait()
        self._metrics.observe_latency(self._context.clock() - handle.started_s)
        return combined.to(handle.device)

    def limit_step(self, limit: StepLimit) -> None:
        """How long the layers dispatched from now on are waited for, besides forward_timeout_s."""
        self._step_limit = limit

    def abandon(self, handle: DispatchHandle) -> None:
        """Gives up a handle that will not be combined."""
        handle.is_combined = True
        handle.abandon()

    def update_placement(self, expert_map: ExpertMap, addresses: Mapping[int, str]) -> None:
        """From now on rows go where `expert_map` says; connections to unchanged addresses stay.

        The same version with other addresses is how a shard that came back is made known; an older version has been
        overtaken and changes nothing.
        """
        with self._update_lock:
            old = self._routing
            if expert_map.placement_version < old.expert_map.placement_version:
                logger.info(
                    "placement %d is ignored, %d is in use",
                    expert_map.placement_version,
                    old.expert_map.placement_version,
                )
                return
            open_transports = {transport.address: transport for transport in old.transports if transport is not None}
            transports: list[ShardTransport | None] = []
            for ep_rank in range(expert_map.ep_size):
                address = addresses.get(ep_rank)
                if address is None:
                    transports.append(None)
                    continue
                if address not in open_transports:
                    open_transports[address] = self._connect(address)
                transports.append(open_transports[address])
            self._routing = routing = self._routing_of(expert_map, tuple(transports))
            self._metrics.set_placement(expert_map.placement_version, routing.max_ranks_per_token)
            for transport in open_transports.values():
                if transport not in transports:
                    transport.close()

    def wait_until_connected(self, timeout_s: float) -> list[int]:
        """Waits until every shard with an address can be reached, at most `timeout_s`; all that still cannot be."""
        give_up_at_s = time.monotonic() + timeout_s
        routing = self._routing
        while time.monotonic() < give_up_at_s and any(
            routing.transports[ep_rank] is not None for ep_rank in routing.down()
        ):
            time.sleep(_CONNECT_POLL_S)
        return routing.down()

    def quarantined_shards(self) -> list[int]:
        """Those that are late too often to be asked while others have the units. From any thread."""
        kept = _kept(self._judged_routing, self._routing)  # the others are forgotten at the next dispatch
        return [ep_rank for ep_rank in self._ledger.health.quarantined() if ep_rank in kept]

    def quarantined_units(self) -> list[WrongUnit]:
        """Replicas whose numbers were wrong. From any thread."""
        return self._ledger.trust.report()

    def stats(self) -> DispatchStats:
        """How far tokens travelled so far."""
        return self._metrics.stats()

    def close(self) -> None:
        """Closes every transport; combining what is in flight raises Unavailable."""
        with self._update_lock:
            self._is_closed = True
            for transport in self._routing.transports:
                if transport is not None:
                    transport.close()

    def _routing_of(self, expert_map: ExpertMap, transports: tuple[ShardTransport | None, ...]) -> Routing:
        limit = expert_map.max_ranks_per_token(self._gate)
        return Routing(expert_map=expert_map, transports=transports, max_ranks_per_token=limit)

    def _newest_routing(self) -> Routing:
        """In the engine thread."""
        if self._is_closed:
            raise Unavailable("the router is closed: the worker is shutting down")
        routing = self._routing
        if routing is not self._judged_routing:
            before, self._judged_routing = self._judged_routing, routing
            self._ledger.keep_shards(_kept(before, routing))
        return routing


def _kept(before: Routing, now: Routing) -> set[int]:
    """Shards that are reached as before. Of one that is reached in another way nothing is known."""
    pairs = enumerate(zip(before.transports, now.transports, strict=False))
    return {ep_rank for ep_rank, (old, new) in pairs if new is not None and new is old}


def _on_cpu(tensor: Tensor) -> Tensor:
    """Contiguous there; the same where it is so already."""
    if tensor.is_cpu and tensor.is_contiguous() and not tensor.requires_grad:
        return tensor
    return tensor.detach().cpu().contiguous()
