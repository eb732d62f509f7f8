"""Samples which experts a worker's tokens choose while it serves. Off, it costs a look at a flag in every layer.

Sits between the decoder and the router, and keeps what passes: expert ids, never hidden states or texts. Memory is
bounded: while it is full, whole micro-batches are left out. It stops by itself when nobody takes what it has.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from router.trace.model_shape import ModelShape
from router.trace.trace import ExpertIds, id_dtype

MAX_BYTES = 16 * 2**20  # of expert ids that nobody has taken yet
LINGER_S = 30.0  # it samples so long after it was asked last


class Dispatcher(Protocol):
    """What it stands before; attention.decoder.ExpertDispatcher."""

    def dispatch(self, layer_id: int, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Any: ...

    def combine(self, handle: Any) -> Tensor: ...

    def abandon(self, handle: Any) -> None: ...


@dataclass(slots=True, eq=False)
class _MicroBatch:
    """On its way through the layers. ids: of the layers so far, [num_tokens, top_k] each."""

    num_tokens: int
    ids: list[ExpertIds] = field(default_factory=list)


class ChoiceSampler:
    """`take` from any thread; the rest is the engine thread's."""

    def __init__(self, dispatcher: Dispatcher, model: ModelShape, clock: Callable[[], float] = time.monotonic) -> None:
        self._dispatcher = dispatcher
        self._rows = {layer_id: row for row, layer_id in enumerate(model.moe_layer_ids)}
        self._dtype = id_dtype(model.gate.n_routed_experts)
        self._token_bytes = model.num_moe_layers * model.top_k * self._dtype.itemsize
        self._shape = model.num_moe_layers, 0, model.top_k
        self._clock = clock
        self._lock = threading.Lock()
        self._samples_until_s = float("-inf")
        self._is_sampling = False  # this step
        self._under_way: list[_MicroBatch] = []
        self._done: deque[_MicroBatch] = deque()

    def begin_step(self) -> bool:
        """Before a step's first layer: whether it is sampled. Then every layer must choose for every token."""
        self._is_sampling = self._clock() < self._samples_until_s
        with self._lock:
            self._under_way.clear()  # of a step that failed
            if not self._is_sampling:
                self._done.clear()
        return self._is_sampling

    def dispatch(self, layer_id: int, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Any:
        """Micro-batches come in the same order in every layer."""
        if self._is_sampling:
            self._keep(self._rows[layer_id], topk_ids.cpu().numpy().astype(self._dtype))
        return self._dispatcher.dispatch(layer_id, hidden_states, topk_weights, topk_ids)

    def combine(self, handle: Any) -> Tensor:
        return self._dispatcher.combine(handle)

    def abandon(self, handle: Any) -> None:
        self._dispatcher.abandon(handle)

    def take(self, max_tokens: int) -> ExpertIds:
        """[num_moe_layers, num_tokens, top_k] sampled since the last call, whole micro-batches of at most max_tokens.

        Begins to sample, and goes on for LINGER_S. A micro-batch larger than max_tokens is left out.
        """
        with self._lock:
            self._samples_until_s = self._clock() + LINGER_S
            taken: list[ExpertIds] = []
            left = max_tokens
            while self._done and (self._done[0].num_tokens <= left or not taken):
                done = self._done.popleft()
                if done.num_tokens <= max_tokens:
                    taken.append(np.stack(done.ids))
                    left -= done.num_tokens
        return np.concatenate(taken, axis=1) if taken else np.zeros(self._shape, dtype=self._dtype)

    def _keep(self, row: int, topk_ids: ExpertIds) -> None:
        num_tokens = len(topk_ids)
        with self._lock:
            if row == 0:
                held = sum(batch.num_tokens for batch in [*self._under_way, *self._done])
                if (held + num_tokens) * self._token_bytes > MAX_BYTES:
                    return
                self._under_way.append(_MicroBatch(num_tokens))
            batch = next((batch for batch in self._under_way if len(batch.ids) == row), None)
            if batch is None or batch.num_tokens != num_tokens:
                return  # of a micro-batch that was left out
            batch.ids.append(topk_ids)
            if len(batch.ids) == len(self._rows):
                self._under_way.remove(batch)
                self._done.append(batch)
