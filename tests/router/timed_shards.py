"""Shards of one process that answer when a test says so, by a clock that the test moves."""

from collections.abc import Callable

import numpy as np
import torch

from protos.poller import Poller
from router.completions import ForwardCall
from router.expert_map import ExpertMap
from router.local_transport import LocalTransport
from router.router import Router
from router.router_config import RouterConfig
from tests.fake_experts import GateConfig, MultiplyingShard, Rows, router_to

TICK_S = 0.001


class Clock:
    """Seconds that pass only when a router waits."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self._due: list[tuple[float, Callable[[], None]]] = []

    def __call__(self) -> float:
        return self.now_s

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        self._due.append((self.now_s + seconds, action))

    def advance(self, seconds: float) -> None:
        """Does what is due within so long, but no more than the first moment at which something is due."""
        until_s = self.now_s + seconds
        next_s = min([until_s, *(due_s for due_s, _ in self._due)])
        self.now_s = max(self.now_s, next_s)
        ready = [action for due_s, action in self._due if due_s <= self.now_s]
        self._due = [(due_s, action) for due_s, action in self._due if due_s > self.now_s]
        for action in ready:
            action()


class TimedPoller(Poller):
    """Waiting moves the clock."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def poll(self, timeout_s: float | None) -> bool:
        assert timeout_s is not None
        self._clock.advance(timeout_s + TICK_S / 1000)
        return super().poll(0.0)


class TimedTransport:
    """A way to a shard that takes `seconds` to answer; None: it does not answer."""

    def __init__(self, clock: Clock, shard: MultiplyingShard, address: str) -> None:
        self.address = address
        self.shard = shard
        self.is_connected = True
        self.seconds: float | None = 0.01
        self.calls: list[ForwardCall] = []
        self.cancelled: list[int] = []
        self._clock = clock

    def forward(self, call: ForwardCall) -> None:
        self.calls.append(call)
        if self.seconds is not None:
            self._clock.after(self.seconds, lambda: self.answer(call))

    def answer(self, call: ForwardCall) -> None:
        LocalTransport(self.shard).forward(call)

    def cancel(self, call: ForwardCall) -> None:
        self.cancelled.append(call.sequence_number)

    def close(self) -> None:
        self.is_connected = False


class TimedShards:
    """A router and its shards."""

    def __init__(self, gate: GateConfig, expert_map: ExpertMap, config: RouterConfig) -> None:
        self.clock = Clock()
        self.transports = [TimedTransport(self.clock, MultiplyingShard(), str(r)) for r in range(expert_map.ep_size)]
        self.router: Router = router_to(
            gate,
            expert_map,
            lambda address: self.transports[int(address)],
            config=config,
            poller=TimedPoller(self.clock),
            clock=self.clock,
        )

    def combine(self, rows: Rows, layer_id: int = 1) -> tuple[torch.Tensor, float]:
        """The sums, and the seconds that they took."""
        started_s = self.clock.now_s
        handle = self.router.dispatch(layer_id, rows.hidden_states, rows.topk_weights, rows.topk_ids)
        sums = self.router.combine(handle)
        return sums, self.clock.now_s - started_s

    def num_calls(self) -> np.ndarray:
        return np.array([len(transport.calls) for transport in self.transports])
