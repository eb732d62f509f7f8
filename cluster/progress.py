"""Shows the processes coming up: a live table in a terminal, one line per change elsewhere (logs, CI)."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live

from cluster.process import ClusterStatus, ProcessState
from cluster.views import processes_view


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
                self._console.print(f"  {name}: {health.state} {health.address or health.detail}")
                self._states[name] = health.state
