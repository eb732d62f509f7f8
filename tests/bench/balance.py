"""Writes docs/balance.md and its pictures: what each placement policy does with skewed, drifting and real traffic.

python -m tests.bench.balance docs        (some minutes of one core; matplotlib comes with the `train` extra)

Everything is replayed: drawn traffic at DeepSeek-V2's size through its gate, and recorded traffic of the bundled model,
of four kinds of text. No number depends on the machine but which texts are installed on it.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from cluster.commands.trace_recording import record
from cluster.commands.trace_requests import RecordingConfig
from router.trace.model_shape import PUBLISHED
from router.trace.replay import ReplayCase, ReplayResult, replay
from router.trace.synthetic import Skew, SyntheticTrace
from router.trace.trace import Trace, TraceHeader, TraceWindow
from router.trace.trace_file import TraceFile
from tests.bench.balance_goals import goals
from tests.bench.drift import draw, drifted

SHARDS = (8, 12, 16, 24, 64)
REDUNDANCIES = (0.0, 0.25, 0.5)
POLICIES = ("static", "device_limited", "eplb")
NUM_TOKENS, NUM_RECORDED_TOKENS = 32768, 16384
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
        gate = replace(trace.header.model.gate, n_group=1, topk_group=1)
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
        SyntheticTrace(PUBLISHED[model], Skew.parse(skew), num_tokens=NUM_TOKENS, seed=0)
        for model, skew in (("v2", "zipf:1.1"), ("v2", "drift"), ("v2-lite", "correlated"))
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
        lines = drifted(bundled)
    draw(lines, folder / "drift.svg")
    text = [INTRODUCTION, "## Goals\n", goals(dict(sections)), "\n## Drift\n", DRIFT]
    for title, results in sections:
        text.append(f"\n## {title}\n\n{HEADER}\n" + "\n".join(map(_line, results)))
    (folder / "balance.md").write_text("\n".join(text) + "\n", encoding="utf-8")


DRIFT = """![balancedness over time with rebalancing on and off](drift.svg)

The bundled model's prompts switch kind every minute, in turn; 3 shards with a quarter of extra replicas. Each minute is
1,024 recorded tokens. On: the controller's own load tracker, policy and hysteresis (half-life 20 s, at least 5 % to
gain, every 15 s at most) decide; a placement is in use 5 s after it was decided. Off: the placement for even load."""


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
