"""Where commands write, and how they end when something is wrong."""

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


def fail(message: str) -> NoReturn:
    """Prints the error and ends the command with status 1."""
    errors.print(f"[bold red]error:[/bold red] {escape(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(1)


def fail_call(error: grpc.RpcError, address: str) -> NoReturn:
    """Ends the command with a call's status; with the reason where nobody at `address` answered it."""
    is_answered = any(key == "grpc-status-details-bin" for key, _ in error.trailing_metadata() or ())
    if error.code() is grpc.StatusCode.UNAVAILABLE and not is_answered:
        fail(f"{error.code().name}: {why_unreachable(address, ClientAccess.from_environment()) or error.details()}")
    fail(f"{error.code().name}: {error.details()}")
