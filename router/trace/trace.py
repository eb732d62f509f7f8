"""A trace: which experts each token chose, layer by layer, in windows that follow one another in time."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from router.trace.model_shape import ModelShape

ExpertIds = npt.NDArray[np.unsignedinteger[Any]]  # uint8 or uint16, see id_dtype
MAX_WINDOW_BYTES = 2**28  # of one window's expert ids: what a reader must hold at least
MAX_TEXT = 4096  # characters of a source or a label


class TraceError(ValueError):
    """A trace that cannot be made, read or replayed; the message says why and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceHeader:
    """What a whole trace has in common.

    source: where the choices come from, for people. seed: of whatever was drawn at random. started_at: ISO 8601.
    """

    model: ModelShape
    source: str
    seed: int | None = None
    started_at: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TraceWindow:
    """Tokens that passed all layers one after the other.

    topk_ids: [num_moe_layers, num_tokens, top_k] of `id_dtype`, logical experts, ascending in a row, no duplicates.
    start_s: since the trace began. seconds: how long the window took. label: a kind of traffic, may be empty.
    """

    topk_ids: ExpertIds
    start_s: float = 0.0
    seconds: float = 0.0
    label: str = ""

    @property
    def num_tokens(self) -> int:
        return int(self.topk_ids.shape[1])


class Trace(Protocol):
    """A file or a generator: can be gone through several times, holds one window at a time."""

    @property
    def header(self) -> TraceHeader: ...

    @property
    def num_tokens(self) -> int: ...

    def windows(self) -> Iterator[TraceWindow]: ...


def id_dtype(n_routed_experts: int) -> np.dtype[np.unsignedinteger[Any]]:
    """The smallest unsigned integer that holds every expert id."""
    return np.dtype(np.uint8) if n_routed_experts <= 2**8 else np.dtype(np.uint16)


def check_window(window: TraceWindow, model: ModelShape) -> None:
    """Raises TraceError unless the window's ids can be the model's."""
    ids, dtype = window.topk_ids, id_dtype(model.gate.n_routed_experts)
    if ids.dtype != dtype or ids.ndim != 3 or ids.shape[0] != model.num_moe_layers or ids.shape[2] != model.top_k:
        raise TraceError(
            f"a window's expert ids are {list(ids.shape)} of {ids.dtype}, {model.name} needs "
            f"[{model.num_moe_layers}, num_tokens, {model.top_k}] of {dtype}"
        )
    if ids.nbytes > MAX_WINDOW_BYTES:
        raise TraceError(
            f"a window of {window.num_tokens} tokens takes {ids.nbytes} bytes, limit is {MAX_WINDOW_BYTES}: "
            "cut it into several"
        )
    if ids.size and int(ids.max()) >= model.gate.n_routed_experts:
        raise TraceError(f"a token chose expert {ids.max()}, {model.name} has {model.gate.n_routed_experts} of them")
    if not (ids[..., 1:] > ids[..., :-1]).all():
        raise TraceError("a token's expert ids do not ascend, or one is there twice")
    if not (np.isfinite(window.start_s) and np.isfinite(window.seconds) and window.start_s >= 0 <= window.seconds):
        raise TraceError(f"a window starts at {window.start_s} s and takes {window.seconds} s: finite, from 0 on")
    if len(window.label) > MAX_TEXT:
        raise TraceError(f"a window's label has {len(window.label)} characters, limit is {MAX_TEXT}")
