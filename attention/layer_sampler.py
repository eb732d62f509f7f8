"""Shows a traced request one layer: how long its rows were away, and at which shards.

Stands between decoder and router. Whoever asks is told of the next layer that begins: every layer of every step would
be thousands of spans a second.
"""

import queue
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from attention.decoder import ExpertDispatcher
from router.attempt import ShardTiming


class LayerSample(NamedTuple):
    """Times: seconds of the monotonic clock."""

    layer_id: int
    num_rows: int
    begin_s: float
    end_s: float
    shards: tuple[ShardTiming, ...]


OnLayer = Callable[[LayerSample], None]
_Asked = tuple[Any, list[OnLayer], int, int, float]  # handle, who asked, layer, rows, when it began


class LayerSampler:
    """An ExpertDispatcher before another one. `ask` from any thread; the rest is the engine thread's."""

    def __init__(self, dispatcher: ExpertDispatcher, clock: Callable[[], float] = time.monotonic) -> None:
        self._dispatcher = dispatcher
        self._clock = clock
        self._asked: queue.SimpleQueue[OnLayer] = queue.SimpleQueue()
        self._under_way: _Asked | None = None

    def ask(self, on_layer: OnLayer) -> None:
        """Calls it once, on the engine thread."""
        self._asked.put(on_layer)

    def dispatch(self, layer_id: int, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Any:
        """Remembers a layer that somebody asked for."""
        if self._asked.empty() or self._under_way is not None:
            return self._dispatcher.dispatch(layer_id, hidden_states, topk_weights, topk_ids)
        listeners = []
        while not self._asked.empty():
            listeners.append(self._asked.get_nowait())
        begin_s = self._clock()
        handle = self._dispatcher.dispatch(layer_id, hidden_states, topk_weights, topk_ids)
        self._under_way = handle, listeners, layer_id, len(hidden_states), begin_s
        return handle

    def combine(self, handle: Any) -> Tensor:
        """Tells who asked."""
        asked = self._taken(handle)  # now, for what fails here is not abandoned
        sums = self._dispatcher.combine(handle)
        if asked is not None:
            _, listeners, layer_id, num_rows, begin_s = asked
            sample = LayerSample(layer_id, num_rows, begin_s, self._clock(), tuple(handle.timings))
            for listener in listeners:
                listener(sample)
        return sums

    def abandon(self, handle: Any) -> None:
        """Who asked is told of none: the step has failed."""
        self._taken(handle)
        self._dispatcher.abandon(handle)

    def _taken(self, handle: Any) -> _Asked | None:
        """What was asked of this handle's layer, which then is under way no more."""
        asked = self._under_way
        if asked is None or asked[0] is not handle:
            return None
        self._under_way = None
        return asked
