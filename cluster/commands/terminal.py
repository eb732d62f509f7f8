"""Where commands write, and how they end when something is wrong."""

from typing import NoReturn

import grpc
import typer
from rich.console import Console
from rich.markup import escape

console = Console()
errors = Console(stderr=True)


def fail(message: str) -> NoReturn:
    """Prints the error and ends the command with status 1."""
    errors.print(f"[bold red]error:[/bold red] {escape(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(1)


def fail_call(error: grpc.RpcError) -> NoReturn:
    """Ends the command with a call's status; a hint where nobody answered it."""
    is_answered = any(key == "grpc-status-details-bin" for key, _ in error.trailing_metadata() or ())
    is_hint_useful = error.code() is grpc.StatusCode.UNAVAILABLE and not is_answered
    hint = " (is `mobula serve` running, and is this its address?)" if is_hint_useful else ""
    fail(f"{error.code().name}: {error.details()}{hint}")
