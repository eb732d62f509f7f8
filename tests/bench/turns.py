"""Measures cells in turn with each peer: the machine's probe, ours, theirs, and again (A B A B).

A machine that is shared gives half as much a minute later, so what is compared stands side by side. Knows nothing of
what a cell measures.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from tests.bench.measured_model import MeasuredModel
from tests.bench.peers.peer import Peer, RunningPeer
from tests.bench.probe import Probe, Reading
from tests.bench.row import Options, Param, Row, Unmeasurable

Measure = Callable[[int], tuple[float, Callable[[Reading], float]]]  # seed -> tokens/s, and their limit for a reading


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One row to be: what to do for ours and for a peer's. theirs is None where peers would take too long."""

    name: str
    params: dict[str, Param]
    ours: Measure
    theirs: Callable[[RunningPeer, int], float] | None


@dataclass(slots=True)
class _Samples:
    ours: list[float] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)
    turns: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    why: str = ""


def measure_in_turn(cells: Sequence[Cell], model: MeasuredModel, options: Options) -> Iterator[Row]:
    """A row for each cell, and a missing one for each peer that could not be measured."""
    probe = Probe(options.num_threads, model.kind)
    samples = [_Samples() for _ in cells]
    failures: list[Row] = []
    peers: list[Peer | None] = [*model.peers(options)] or [None]
    for number, peer in enumerate(peers):
        with ExitStack() as stack:
            running = None
            if peer:
                options.show(f"{model.name} {model.kind}: starting {peer.name}")
                try:
                    running = stack.enter_context(RunningPeer(peer, model.folder, model.kind, options))
                except Unmeasurable as error:
                    failures.append(Row.missing(cells[0].name, model.params | {"peer": peer.name}, str(error)))
            for cell, kept in zip(cells, samples, strict=True):
                if running and cell.theirs:
                    num_repeats = max(1, options.num_repeats - 1)
                else:  # without a peer to compare with, once for all
                    num_repeats = options.num_repeats if number == 0 else 0
                try:
                    if running and cell.theirs:
                        cell.theirs(running, 0)  # the first of a kind is cold; ours have had theirs
                    for repeat in range(num_repeats):
                        _one_turn(cell, kept, running, probe, options, seed=1 + 100 * number + repeat)
                except Unmeasurable as error:
                    kept.why = str(error)
    for cell, kept in zip(cells, samples, strict=True):
        if not kept.ours:
            yield Row.missing(cell.name, cell.params, kept.why or "not measured")
            continue
        params = cell.params | dict(probe.params())
        yield Row.of(cell.name, params, kept.ours, "tokens/s", limits=kept.limits, turns=kept.turns)
        if kept.why:
            yield Row.missing(cell.name, cell.params, kept.why)
    yield from failures


def _one_turn(
    cell: Cell, kept: _Samples, running: RunningPeer | None, probe: Probe, options: Options, *, seed: int
) -> None:
    against = f" against {running.name}" if running and cell.theirs else ""
    what = " ".join(str(value) for value in cell.params.values())
    options.show(f"{cell.name} {what}{against}")
    options.check_time(5.0)
    if running:
        running.settle()
    reading = probe.look()
    value, limit = cell.ours(seed)
    kept.ours.append(value)
    kept.limits.append(limit(reading))
    if running and cell.theirs:
        time.sleep(0.05)  # the last answers of ours are still being cleared away
        kept.turns[running.name].append((value, cell.theirs(running, seed)))
