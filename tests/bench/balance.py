"""Writes docs/balance.md and its pictures: what each placement policy does with skewed, drifting and real traffic.

python -m tests.bench.balance docs        (a quarter of an hour of one core; matplotlib comes with the `train` extra)

Everything is replayed: drawn traffic at DeepSeek-V2's size through its gate, and recorded traffic of the bundled model,
of four kinds of text. No number depends on the machine but which texts are installed on it.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from cluster.commands.trace_recording import record
from cluster.commands.trace_requests import RecordingConfig
from router.gate_config import TopkMethod
from router.trace.model_shape import PUBLISHED, ModelShape
from router.trace.replay import ReplayCase, ReplayResult, replay
from router.trace.synthetic import Skew, SyntheticTrace
from router.trace.trace import ExpertIds, Trace, TraceHeader, TraceWindow
from router.trace.trace_file import TraceFile
from tests.bench.balance_goals import coolest_possible, goals
from tests.bench.drift import draw, drifted, kinds_of

SHARDS = (8, 12, 16, 24, 64)
REDUNDANCIES = (0.0, 0.25, 0.5)
POLICIES = ("static", "device_limited", "eplb")
NUM_ZIPF_TOKENS, NUM_TOKENS, NUM_RECORDED_TOKENS = 131072, 32768, 16384
HEADER = (
    "| shards | extra | policy | balance, all layers | hottest, mean | hottest, p99 | ranks, mean | ranks, max "
    "| bytes a token | weights a shard | step |\n|---|---|---|---|---|---|---|---|---|---|---|"
)
INTRODUCTION = """# Balance: what each placement does with skewed, drifting and real traffic

Made by `python -m tests.bench.balance docs`. Placed by the first half of a trace and scored on the second, in steps of
256 tokens, as `mobula trace replay` does; [what the figures mean](../README.md#decide-on-your-own-traffic). `extra` is
redundancy: replicas beyond one, as a share of all units. `hottest` is the hottest shard within a layer over the layer's
load / n_group. A step's time is the replay's model of it (200 TFLOP/s, 10 us a shard asked, 25 GB/s): to compare with.
Policies that have no placement for a size are left out.
"""


class Ungrouped:
    """A trace as if its gate had no groups: units may then be cut anywhere."""

    def __init__(self, trace: Trace) -> None:
        gate = replace(trace.header.model.gate, n_group=1, topk_group=1, topk_method=TopkMethod.GREEDY)
        self._trace = trace
        self.header: TraceHeader = replace(trace.header, model=replace(trace.header.model, gate=gate))

    @property
    def num_tokens(self) -> int:
        return self._trace.num_tokens

    def windows(self) -> Iterator[TraceWindow]:
        return self._trace.windows()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(arguments).folder
    zipf, drift, correlated = (
        SyntheticTrace(PUBLISHED[model], Skew.parse(skew), num_tokens=num_tokens, seed=0)
        for model, skew, num_tokens in (
            ("v2", "zipf:1.1", NUM_ZIPF_TOKENS),
            ("v2", "drift", NUM_TOKENS),
            ("v2-lite", "correlated", NUM_TOKENS),
        )
    )
    with tempfile.TemporaryDirectory() as temporary:
        recorded = Path(temporary) / "bundled.npz"
        record(RecordingConfig(model="bundled", max_tokens=NUM_RECORDED_TOKENS), recorded)
        bundled = TraceFile(recorded)
        at_zipf = _replayed(zipf, SHARDS, REDUNDANCIES, POLICIES)
        sections = [
            ("DeepSeek-V2, Zipf 1.1", at_zipf),
            ("DeepSeek-V2, drifting", _replayed(drift, SHARDS, (0.0, 0.25), POLICIES)),
            ("The bundled model, four kinds of prompt", _replayed(bundled, SHARDS, (0.0, 0.25), POLICIES)),
            (
                "The bundled model as if it had no groups",
                _replayed(Ungrouped(bundled), (4, 8), (0.0,), ("static", "coactivation")),
            ),
            (
                "DeepSeek-V2-Lite, experts that fire together",
                _replayed(correlated, (4, 8), (0.0,), ("static", "coactivation")),
            ),
        ]
        steps_of_kinds = {
            "DeepSeek-V2's size, four drawn kinds of Zipf 1.1, 12 shards": (_kinds_at_v2_size(), 12),
            "the bundled model, its four kinds of prompt, 3 shards": (kinds_of(bundled), 3),
        }
        lines = {title: drifted(model, kinds, n) for title, ((model, kinds), n) in steps_of_kinds.items()}
    draw(lines, folder / "drift.svg")
    hottest = coolest_possible(zipf, (0.25, 0.5))
    text = [INTRODUCTION, "## Goals\n", goals(dict(sections), hottest), "\n## Drift\n", DRIFT]
    for title, results in sections:
        text.append(f"\n## {title}\n\n{HEADER}\n" + "\n".join(map(_line, results)))
    (folder / "balance.md").write_text("\n".join(text) + "\n", encoding="utf-8")


DRIFT = """![balancedness over time with rebalancing on and off](drift.svg)

Prompts switch kind every minute, in turn; a quarter of extra replicas. Every 5 s are a step of 256 tokens. On: the
controller's own load tracker, policy and hysteresis (half-life 10 s, at least 3 % to gain, every 10 s at most) decide;
a placement is in use 5 s after it was decided. Off: the placement for even load. The bundled model was trained to
balance whatever it reads, so there is little to gain with it; kinds of traffic that each have hot experts of their own
are what rebalancing is for."""


def _kinds_at_v2_size() -> tuple[ModelShape, list[ExpertIds]]:
    """Four kinds whose hot experts have nothing in common."""
    traces = [SyntheticTrace(PUBLISHED["v2"], Skew.parse("zipf:1.1"), num_tokens=3072, seed=seed) for seed in range(4)]
    return PUBLISHED["v2"], [np.concatenate([w.topk_ids for w in trace.windows()], axis=1) for trace in traces]


def _replayed(
    trace: Trace, shards: Sequence[int], redundancies: Sequence[float], policies: Sequence[str]
) -> list[ReplayResult]:
    cases = [
        ReplayCase(policy=policy, ep_size=ep_size, redundancy=redundancy)
        for ep_size in shards
        for redundancy in redundancies
        for policy in policies
    ]
    sys.stderr.write(f"{trace.header.source}: {len(cases)} placements\n")
    return [result for result in replay(trace, cases) if result.score is not None]


def _line(result: ReplayResult) -> str:
    case, score = result.case, result.score
    assert score is not None
    cells = (
        f"{case.ep_size}",
        f"{case.redundancy:.0%}",
        case.policy,
        f"{score.balancedness_total:.3f}",
        f"{score.hottest_mean:.2f}",
        f"{score.hottest_p99:.2f}",
        f"{score.ranks_per_token_mean:.2f}",
        f"{score.ranks_per_token_max}",
        f"{score.bytes_per_token / 2**20:.2f} MiB",
        f"{result.weight_bytes / 2**30:.2f} GiB",
        f"{1e3 * score.step_time_s:.2f} ms",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
