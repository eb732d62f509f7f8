"""`mobula leave`: what a node runs before it ends, as Kubernetes' preStop does: its processes hand over what they do.

Speaks to nobody: it writes the configuration's `leave_file`, which the node's processes notice and tell the controller,
and waits until they have ended. So it needs no key and no way through the network.
"""

import os
import socket
import time
from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.terminal import console, fail

POLL_S = 0.5


def leave(
    file: Annotated[Path, typer.Argument(help="The configuration's leave_file.")],
    health_port: Annotated[int, typer.Option(min=1, max=65535, help="Of the process that is to end, on this node.")],
    timeout_s: Annotated[float, typer.Option(min=0, help="How long to wait, in seconds.")] = 100.0,
) -> None:
    """Let this node's processes hand over what they do, and wait until they have ended."""
    try:
        file.touch()
    except OSError as error:
        fail(f"cannot write {file}: {error.strerror}")
    host = os.environ.get("POD_IP", "127.0.0.1")
    deadline_s = time.monotonic() + timeout_s
    while _listens(host, health_port):
        if time.monotonic() >= deadline_s:
            fail(f"{host}:{health_port} still listens after {timeout_s:g} s; what it computes is cut off")
        time.sleep(POLL_S)
    console.print("handed over")


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=POLL_S).close()
    except OSError:
        return False
    return True
