"""Traffic with a known skew, drawn with a seed: the same seed gives the same trace, window by window.

A token's logit for an expert is the logarithm of the expert's popularity plus Gumbel noise, and the model's own gate
chooses from the logits. Without expert groups that draws experts one after the other, without putting back, each in
proportion to its popularity; with groups, the groups' best experts (V2) or best two (V3) choose the groups first.

    zipf:S        the n-th most popular expert has popularity n ** -S; which one that is, is drawn for each layer
    drift:S       zipf:S that moves on, evenly in log popularity, to another drawing and from there to a third
    bursts:S      zipf:S in which now and then a few experts of each layer are BURST_FACTOR times as popular
    correlated:B  experts lie in hidden sets of 8 of the same popularity; a token has a set in every layer, whose
                  experts are B times as likely for it as the others: who keeps sets together, visits fewer shards
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from router.gate_config import GateConfig, TopkMethod
from router.trace.model_shape import ModelShape
from router.trace.trace import TraceError, TraceHeader, TraceWindow, id_dtype

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]

NUM_DRAWINGS = 3  # that drift passes through
BURST_FACTOR = 16.0
BURST_WINDOWS = 2  # a burst lasts so many windows
BURST_SHARE = 0.3  # of the stretches of so many windows, that have one
BURST_EXPERTS = 4  # of each layer
SET_SIZE = 8  # experts that correlated traffic fires together
WINDOW_TOKENS = 512
MAX_TOKENS = 2**24


class SkewKind(StrEnum):
    """What is uneven."""

    ZIPF = "zipf"
    DRIFT = "drift"
    BURSTS = "bursts"
    CORRELATED = "correlated"


_DEFAULT_STRENGTH = {SkewKind.CORRELATED: 100.0}
_MAX_STRENGTH = {SkewKind.CORRELATED: 1e6}


@dataclass(frozen=True, slots=True, kw_only=True)
class Skew:
    """strength: S or B of the module's table."""

    kind: SkewKind
    strength: float

    @classmethod
    def parse(cls, text: str) -> "Skew":
        """ "zipf:1.1", or a kind alone for 1.1 (correlated: 100). Raises TraceError."""
        name, separator, number = text.partition(":")
        if name not in list(SkewKind):
            raise TraceError(
                f"skew is {text!r}, known are {', '.join(SkewKind)}, each with a number or without: zipf:1.1"
            )
        kind = SkewKind(name)
        least, most = (1.0 if kind is SkewKind.CORRELATED else 0.0), _MAX_STRENGTH.get(kind, 10.0)
        try:
            strength = float(number) if separator else _DEFAULT_STRENGTH.get(kind, 1.1)
        except ValueError:
            strength = float("nan")
        if not least <= strength <= most:
            raise TraceError(f"skew is {text!r}, its number must be {least:g} to {most:g}")
        return cls(kind=kind, strength=strength)

    def __str__(self) -> str:
        return f"{self.kind}:{self.strength:g}"


class SyntheticTrace:
    """Implements router.trace.trace.Trace; windows are drawn when they are asked for."""

    def __init__(
        self, model: ModelShape, skew: Skew, *, num_tokens: int, seed: int, window_tokens: int = WINDOW_TOKENS
    ) -> None:
        """Raises TraceError."""
        if not 1 <= num_tokens <= MAX_TOKENS:
            raise TraceError(f"num_tokens is {num_tokens}, must be 1 to {MAX_TOKENS}")
        if not 0 <= seed < 2**63:
            raise TraceError(f"seed is {seed}, must be 0 to {2**63 - 1}")
        self.header = TraceHeader(model=model, source=f"synthetic {skew}", seed=seed)
        self.num_tokens = num_tokens
        self._model = model
        self._skew = skew
        self._window_tokens = window_tokens
        self._num_windows = -(-num_tokens // window_tokens)
        self._seed = seed
        self._dtype = id_dtype(model.gate.n_routed_experts)
        structure = np.random.default_rng((seed, 0))
        self._ranks = np.stack([self._permutations(structure) for _ in range(NUM_DRAWINGS)])
        self._sets: Int64Array = self._ranks[0] // min(
            SET_SIZE, model.gate.n_routed_experts
        )  # [num_moe_layers, n_routed_experts]
        num_stretches = -(-self._num_windows // BURST_WINDOWS)
        self._bursts = set(structure.permutation(num_stretches)[: math.ceil(BURST_SHARE * num_stretches)].tolist())

    def windows(self) -> Iterator[TraceWindow]:
        """See Trace. A window of 512 tokens counts as a second."""
        for number in range(self._num_windows):
            num_tokens = min(self._window_tokens, self.num_tokens - number * self._window_tokens)
            rng = np.random.default_rng((self._seed, 1, number))
            shape = self._model.num_moe_layers, num_tokens, self._model.gate.n_routed_experts
            # exp(-logit) of log popularity plus Gumbel noise is an exponential variable over the popularity
            keys = rng.standard_exponential(shape, dtype=np.float32)
            keys /= self.popularity(number)[:, None, :]
            if self._skew.kind is SkewKind.CORRELATED:
                self._favour_sets(keys, rng)
            ids = choose_experts(keys, self._model.gate).astype(self._dtype)
            seconds = self._window_tokens / WINDOW_TOKENS
            yield TraceWindow(topk_ids=ids, start_s=number * seconds, seconds=seconds, label=self._skew.kind)

    def popularity(self, window: int) -> Float32Array:
        """[num_moe_layers, n_routed_experts], sums to 1 in each layer; of correlated traffic without its sets."""
        exponent = 0.0 if self._skew.kind is SkewKind.CORRELATED else self._skew.strength
        log_popularity = -exponent * np.log1p(self._ranks)  # [NUM_DRAWINGS, num_moe_layers, n_routed_experts]
        if self._skew.kind is SkewKind.DRIFT and self._num_windows > 1:
            place = window / (self._num_windows - 1) * (NUM_DRAWINGS - 1)
            before = min(int(place), NUM_DRAWINGS - 2)
            share = place - before
            mixed = (1 - share) * log_popularity[before] + share * log_popularity[before + 1]
        else:
            mixed = log_popularity[0]
        popularity = np.exp(mixed)
        if self._skew.kind is SkewKind.BURSTS:
            self._burst(popularity, window)
        shares: Float32Array = (popularity / popularity.sum(axis=-1, keepdims=True)).astype(np.float32)
        return shares

    def _permutations(self, rng: np.random.Generator) -> Int64Array:
        """Of the experts of each layer: [num_moe_layers, n_routed_experts]."""
        experts = np.tile(np.arange(self._model.gate.n_routed_experts), (self._model.num_moe_layers, 1))
        permuted: Int64Array = rng.permuted(experts, axis=-1)
        return permuted

    def _burst(self, popularity: npt.NDArray[np.float64], window: int) -> None:
        """Makes a few experts of each layer hot, in some stretches of windows."""
        stretch = window // BURST_WINDOWS
        if stretch in self._bursts:
            hot = self._permutations(np.random.default_rng((self._seed, 2, stretch)))[:, :BURST_EXPERTS]
            np.put_along_axis(popularity, hot, np.take_along_axis(popularity, hot, -1) * BURST_FACTOR, -1)

    def _favour_sets(self, keys: Float32Array, rng: np.random.Generator) -> None:
        """Draws a set for each token and makes its experts likelier. keys: [num_moe_layers, num_tokens, experts]."""
        num_sets = int(self._sets.max()) + 1
        chosen = rng.integers(num_sets, size=keys.shape[1])
        factor = np.float32(1.0 / self._skew.strength)
        for layer, sets in enumerate(self._sets):
            is_member = np.equal.outer(chosen, sets)  # [num_tokens, experts]
            keys[layer] *= np.where(is_member, factor, np.float32(1.0))


def choose_experts(keys: Float32Array, gate: GateConfig) -> Int64Array:
    """What the gate chooses from logits -log(keys): the experts of [..., top_k], ascending.

    keys: [..., n_routed_experts] fp32, positive. As router.gate.select_experts without a bias, in numpy, and ties open.
    """
    top_k = gate.num_experts_per_tok
    if not gate.is_group_limited:
        return np.sort(_smallest(keys, top_k), axis=-1)
    grouped = keys.reshape(*keys.shape[:-1], gate.n_group, gate.experts_per_group)
    if gate.topk_method is TopkMethod.NOAUX_TC:  # a group counts by its best two; the sigmoid of -log x is 1 / (1 + x)
        count = min(2, gate.experts_per_group)
        best = np.partition(grouped, count - 1, axis=-1)[..., :count] if count < gate.experts_per_group else grouped
        group_keys = -(1.0 / (1.0 + best)).sum(axis=-1)
    else:
        group_keys = grouped.min(axis=-1)
    groups = np.sort(_smallest(group_keys, gate.topk_group), axis=-1)  # [..., topk_group]
    kept = np.take_along_axis(grouped, groups[..., None], axis=-2)
    local = _smallest(kept.reshape(*keys.shape[:-1], -1), top_k)
    chosen = np.take_along_axis(groups, local // gate.experts_per_group, axis=-1)
    return np.sort(chosen * gate.experts_per_group + local % gate.experts_per_group, axis=-1)


def _smallest(values: Float32Array, count: int) -> Int64Array:
    """Indices of the `count` smallest of the last axis, in no order."""
    if count == values.shape[-1]:
        return np.broadcast_to(np.arange(count), values.shape).copy()
    return np.argpartition(values, count - 1, axis=-1)[..., :count]
