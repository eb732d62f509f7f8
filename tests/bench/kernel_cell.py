"""Measures one kernel call against the machine's limit and against others on the same numbers.

A limit is the larger of two times: reading at the probe's bandwidth, multiplying at its peak. Both probes run before
every repeat, and the others after it.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from tests.bench.probe import Probe, Reading
from tests.bench.row import Options, Row

REPEAT_S, QUICK_REPEAT_S = 0.3, 0.1  # a repeat is as many calls as fill this, at least one


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One call of a kernel, and by their names of others that have the like, torch say.

    num_bytes and num_operations: what one call has to read and to do.
    """

    name: str
    params: dict[str, str | int | float]
    num_bytes: float
    num_operations: float
    ours: Callable[[], object]
    theirs: Mapping[str, Callable[[], object]] = field(default_factory=dict)
    kind: str = "bf16"  # whose peak is the limit


def measure(cell: Cell, options: Options) -> Row:
    """Milliseconds a call."""
    options.show(f"{cell.name} {cell.params}")
    options.check_time(10.0)
    probe = Probe(options.num_threads, cell.kind)
    before = torch.get_num_threads()
    torch.set_num_threads(options.num_threads)
    try:
        ours, limits = [], []
        turns: dict[str, list[tuple[float, float]]] = {name: [] for name in cell.theirs if options.has_peers}
        for _ in range(2 * options.num_repeats):
            limits.append(_limit_ms(cell, probe.look()))
            ours.append(_milliseconds(cell.ours, options))
            for name, pairs in turns.items():
                pairs.append((ours[-1], _milliseconds(cell.theirs[name], options)))
    finally:
        torch.set_num_threads(before)
    row = Row.of(cell.name, cell.params, ours, "ms", limits=limits, turns=turns)
    return row.with_params(**probe.params())


def _limit_ms(cell: Cell, reading: Reading) -> float:
    return 1e3 * max(cell.num_bytes / reading.bytes_per_s, cell.num_operations / reading.operations_per_s)


def _milliseconds(action: Callable[[], object], options: Options) -> float:
    """Of one call, over as many as fill a repeat."""
    budget = QUICK_REPEAT_S if options.is_quick else REPEAT_S
    start, num_calls = time.perf_counter(), 0
    while num_calls == 0 or time.perf_counter() - start < budget:
        action()
        num_calls += 1
    return 1e3 * (time.perf_counter() - start) / num_calls
