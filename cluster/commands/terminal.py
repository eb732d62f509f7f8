"""Where commands write, and how they end when something is wrong."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import grpc
import typer
from rich.console import Console
from rich.markup import escape

from cluster.client_access import ClientAccess
from cluster.commands.reachability import why_unreachable

INTERRUPTED = 130  # the status of what Ctrl-C has ended, as shells have it

console = Console()
errors = Console(stderr=True)


class Stopped(KeyboardInterrupt):
    """SIGTERM or SIGHUP has come."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def signals_as_ctrl_c() -> Iterator[None]:
    """Within, SIGTERM and SIGHUP raise Stopped, so that what Ctrl-C tidies up they tidy up too. Only the first of them:
    a second one would end the tidying up.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        for other in before:
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(number)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    # nohup has SIGHUP ignored
    before = {number: handler for number in numbers if (handler := signal.getsignal(number)) is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def status_of(interrupt: KeyboardInterrupt) -> int:
    """What the command ends with, as shells have it."""
    return 128 + interrupt.number if isinstance(interrupt, Stopped) else INTERRUPTED


def fail(message: str, status: int = 1) -> NoReturn:
    """Prints the error and ends the command."""
    errors.print(f"[bold red]error:[/bold red] {escape(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(status)


def fail_call(error: grpc.RpcError, address: str) -> NoReturn:
    """Ends the command with a call's status; with the reason where nobody at `address` answered it."""
    is_answered = any(key == "grpc-status-details-bin" for key, _ in error.trailing_metadata() or ())
    if error.code() is grpc.StatusCode.UNAVAILABLE and not is_answered:
        fail(f"{error.code().name}: {why_unreachable(address, ClientAccess.from_environment()) or error.details()}")
    fail(f"{error.code().name}: {error.details()}")
