"""What was aimed at for placements, and what was reached, as a table for docs/balance.md."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from router.trace.replay import ReplayResult
from router.trace.score import Score
from router.trace.trace import Trace

ZIPF = "DeepSeek-V2, Zipf 1.1"
Results = Mapping[str, Sequence[ReplayResult]]


def coolest_possible(trace: Trace, redundancies: Sequence[float]) -> dict[float, float]:
    """By redundancy: the p99 over layers of the hottest unit over its replicas, over layer load / n_group.

    With as many replicas as there are, given to whichever unit of all layers is the hottest, one after the other: no
    placement of whole groups has a cooler hottest shard in its hottest layer. Of the part of the trace that is scored.
    """
    gate = trace.header.model.gate
    ids = np.concatenate([window.topk_ids for window in trace.windows()], axis=1)[:, trace.num_tokens // 2 :]
    units = ids.astype(np.int64) // (gate.n_routed_experts // gate.n_group)
    load = np.stack([np.bincount(layer.ravel(), minlength=gate.n_group) for layer in units]).astype(np.float64)
    load *= gate.n_group / load.sum(axis=1, keepdims=True)
    bounds = {}
    for redundancy in redundancies:
        counts = np.ones_like(load)
        for _ in range(int(load.size * redundancy)):
            counts[np.unravel_index((load / counts).argmax(), load.shape)] += 1
        bounds[redundancy] = float(np.percentile((load / counts).max(axis=1), 99))
    return bounds


def goals(results: Results, hottest: Mapping[float, float]) -> str:
    """A row each: the goal, the worst case of what it is about, whether it was reached. hottest: coolest_possible."""
    rows = ["| goal | reached | |", "|---|---|---|"]
    for name, values, limit, is_at_most in _goals(results, hottest):
        worst = max(values) if is_at_most else min(values)
        is_met = worst <= limit if is_at_most else worst >= limit
        sign = "at most" if is_at_most else "at least"
        rows.append(f"| {name}: {sign} {limit:g} | {worst:.3f} | {'yes' if is_met else 'no, see below'} |")
    return "\n".join(rows) + "\n\n" + BOUNDS


BOUNDS = """\
The hottest shard within a layer cannot be cooler than the layer's hottest unit divided by its replicas: the bound, with
replicas given by the very tokens that are scored. What lies above it is chance: a placement knows other tokens, 65,536
of them here. By 16,384 the two figures are 1.411 and 1.003.

Experts that fire together: the bundled model is trained with groups. A token's 6 experts lie in 3 of 8 groups in every
layer, and contiguous units are those groups: they already are the sets that fire together, and there is nothing for
`coactivation` to find. On 8 shards a token visits 3.00 of them; 2 is the least that any units of 4 experts allow."""


def _goals(results: Results, hottest: Mapping[float, float]) -> Iterable[tuple[str, list[float], float, bool]]:
    zipf = results[ZIPF]
    yield "`device_limited`, ranks a token, everywhere", _of(_limited(zipf), lambda s: s.ranks_per_token_max), 3, True
    yield (
        "its balance over all layers, no extra, 8 to 24 shards",
        _of(_limited(zipf, range(8, 25), 0.0), lambda s: s.balancedness_total),
        0.99,
        False,
    )
    yield "the same on 64 shards", _of(_limited(zipf, (64,), 0.0), lambda s: s.balancedness_total), 0.97, False
    for redundancy, limit in ((0.25, 1.4), (0.5, 1.0)):
        yield (
            f"hottest in a layer, p99, {redundancy:.0%} extra, 12 shards and more (bound {hottest[redundancy]:.3f})",
            _of(_limited(zipf, (12, 16, 24, 64), redundancy), lambda s: s.hottest_p99),
            limit,
            True,
        )
    yield "step time over `eplb`'s at equal memory", _over_eplb(zipf, lambda s: s.step_time_s), 1.0, True
    yield "shard visits over `eplb`'s", _over_eplb(zipf, lambda s: s.ranks_per_token_mean), 0.667, True
    for title in ("DeepSeek-V2-Lite, experts that fire together", "The bundled model as if it had no groups"):
        yield f"`coactivation`, ranks over contiguous; {title}", _over_contiguous(results[title]), 0.8, True


def _limited(
    results: Sequence[ReplayResult], shards: Iterable[int] | None = None, redundancy: float | None = None
) -> list[Score]:
    wanted = None if shards is None else set(shards)
    return [
        result.score
        for result in results
        if result.score is not None
        and result.case.policy == "device_limited"
        and (wanted is None or result.case.ep_size in wanted)
        and redundancy in (None, result.case.redundancy)
    ]


def _of(scores: Sequence[Score], figure: Callable[[Score], float]) -> list[float]:
    return [figure(score) for score in scores]


def _over_eplb(results: Sequence[ReplayResult], figure: Callable[[Score], float]) -> list[float]:
    return _ratios(results, "device_limited", "eplb", figure)


def _over_contiguous(results: Sequence[ReplayResult]) -> list[float]:
    return _ratios(results, "coactivation", "static", lambda score: score.ranks_per_token_mean)


def _ratios(results: Sequence[ReplayResult], policy: str, other: str, figure: Callable[[Score], float]) -> list[float]:
    by_case = {(r.case.policy, r.case.ep_size, r.case.redundancy): r.score for r in results}
    return [
        figure(score) / figure(against)
        for (name, ep_size, redundancy), score in by_case.items()
        if name == policy and score is not None and (against := by_case.get((other, ep_size, redundancy))) is not None
    ]
