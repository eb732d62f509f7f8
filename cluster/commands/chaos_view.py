"""What a person sees of a chaos run: the list of faults, a bar while it runs, a table of what it cost."""

from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from cluster.chaos.catalog import SCENARIOS
from cluster.chaos.report import Report
from cluster.chaos.run import RunResult


class ChaosProgress:
    """Use as a context manager; call `show` with what is being done and the share of the run that is over."""

    def __init__(self, console: Console, *, is_shown: bool) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self._console = console
        self._is_shown = is_shown
        self._bar = Progress(*columns, console=console, disable=not (is_shown and console.is_terminal), transient=True)
        self._task = self._bar.add_task("starting", total=1.0)
        self._said = ""

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, what: str, share: float) -> None:
        """Draws it; where there is no terminal, a line for each new `what`."""
        self._bar.update(self._task, description=what, completed=share)
        if self._is_shown and self._bar.disable and what != self._said:
            self._console.print(f"  {what}", markup=False)
        self._said = what


def scenarios_view() -> RenderableType:
    """Every fault by name."""
    table = Table(box=None, padding=(0, 2))
    table.add_column("name", style="bold")
    table.add_column("what is done")
    for name, scenario in SCENARIOS.items():
        table.add_row(name, scenario.summary)
    return table


def result_view(name: str, result: RunResult) -> RenderableType:
    """The figures with what they mean, then the notes."""
    report = result.report
    table = Table(box=None, padding=(0, 2), show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    table.add_row("requests", str(report.requests), "in all, greedy and seeded")
    table.add_row("failed", _count(report.failed), "ended with a status instead of an answer")
    table.add_row("changed", _count(report.changed), "had other tokens than undisturbed")
    stalls = "longest wait for a token beyond the usual one, of requests under way"
    for label, seconds in _stalls(report):
        table.add_row(f"stall {label}", _seconds(seconds), stalls if label == "p50" else "")
    ratio = "-" if report.throughput_ratio is None else f"{report.throughput_ratio:.0%}"
    table.add_row("throughput", ratio, "of what the machine gives beside starting processes")
    table.add_row("redundancy", _seconds(report.time_to_redundancy_s), "after the fault until all was as before")
    verdict = Text("nothing was lost", "bold green") if report.is_good else Text("something was lost", "bold red")
    return Group(Text.assemble((name, "bold"), ": ", verdict), table, *(Text(f"  {note}") for note in result.notes))


def _stalls(report: Report) -> tuple[tuple[str, float | None], ...]:
    return (("p50", report.stall_p50_s), ("p99", report.stall_p99_s), ("max", report.stall_max_s))


def _count(number: int) -> Text:
    return Text(str(number), style="bold red" if number else "green")


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.2f} s"
