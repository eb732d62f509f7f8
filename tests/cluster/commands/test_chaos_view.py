"""What a person reads of a chaos run."""

from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from cluster.chaos.report import Report
from cluster.chaos.run import RunResult
from cluster.commands.chaos_view import ChaosProgress, result_view

GOOD = Report(
    requests=72,
    failed=0,
    changed=0,
    stall_p50_s=0.125,
    stall_p99_s=0.25,
    stall_max_s=0.5,
    throughput_ratio=0.97,
    time_to_redundancy_s=None,
)


def shown(result: RunResult) -> str:
    console = Console(file=StringIO(), width=110)
    console.print(result_view("kill-shard", result))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_every_figure_is_there_and_what_was_not_measured_is_a_dash() -> None:
    text = shown(RunResult(report=GOOD, notes=("a note with [brackets]",)))
    for part in (
        "kill-shard: nothing was lost",
        "72",
        "0.12 s",
        "0.25 s",
        "0.50 s",
        "97%",
        "-    after the fault",
        "[brackets]",
    ):
        assert part in text


@pytest.mark.parametrize("loss", [{"failed": 3}, {"changed": 1}])
def test_a_loss_is_said_first(loss: dict[str, int]) -> None:
    assert "something was lost" in shown(RunResult(report=replace(GOOD, **loss), notes=())).splitlines()[0]


@pytest.mark.parametrize(("is_shown", "lines"), [(True, ["  starting", "  load"]), (False, [])])
def test_without_a_terminal_each_part_of_a_run_is_a_line(is_shown: bool, lines: list[str]) -> None:
    console = Console(file=StringIO(), width=80)
    with ChaosProgress(console, is_shown=is_shown) as progress:
        for what in ("starting", "load", "load"):
            progress.show(what, 0.5)
    assert isinstance(console.file, StringIO)
    assert console.file.getvalue().splitlines() == lines
