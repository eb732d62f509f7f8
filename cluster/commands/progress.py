"""Shows the processes coming up and experts moving: live in a terminal, one line per change elsewhere (logs, CI)."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from cluster.commands.views import processes_view
from cluster.controller.process import ClusterStatus, ProcessState
from cluster.controller.rebalance import RebalanceState, RebalanceStatus


class StartProgress:
    """Use as a context manager; call `show` with every new status."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(processes_view(None), console=console, refresh_per_second=4) if console.is_terminal else None
        self._states: dict[str, ProcessState] = {}

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def show(self, status: ClusterStatus | None) -> None:
        """Draws the processes' states."""
        if self._live:
            self._live.update(processes_view(status))
            return
        for name, health in status.processes if status else ():
            if self._states.get(name) is not health.state and health.state not in (
                ProcessState.STARTING,
                ProcessState.DOWN,
            ):
                self._console.print(
                    f"  {name}: {health.state} {health.address or health.detail}", markup=False, soft_wrap=True
                )
                self._states[name] = health.state


class RebalanceProgress:
    """Use as a context manager; call `show` with every new status."""

    def __init__(self, console: Console, planned_bytes: int, *, is_shown: bool = True) -> None:
        """planned_bytes: that shards read in all; is_shown: False to write nothing."""
        self._console = console
        self._is_shown = is_shown
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
        is_live = is_shown and console.is_terminal
        self._bar = Progress(*columns, TimeRemainingColumn(), console=console, disable=not is_live)
        self._task = self._bar.add_task("waiting", total=planned_bytes)
        self._state = RebalanceState.IDLE

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, status: RebalanceStatus) -> None:
        """Draws the bytes that were read. When idle: it has not begun, or has ended."""
        if status.state is RebalanceState.IDLE:
            return
        self._bar.update(self._task, description=status.state.value, completed=status.moved_bytes)
        if self._is_shown and self._bar.disable and status.state is not self._state:
            self._console.print(f"  {status.state}")
        self._state = status.state
