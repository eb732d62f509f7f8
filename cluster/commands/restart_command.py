"""`mobula restart`: every process is replaced, one after another, while requests run."""

import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, NamedTuple, Protocol, TypeVar

import grpc
import typer

from cluster.client import BROKEN, DEFAULT_ADDRESS, AdminClient
from cluster.commands.arguments import Address, within
from cluster.commands.terminal import console, fail, fail_call
from cluster.controller.process import RoleName
from protos import admin_pb2

POLL_S = 0.5
TIMEOUT = within(0.0, 86400.0, "large checkpoints load for minutes")
T = TypeVar("T")
FIRST_ANSWER_S = 10.0  # a gateway that is replaced is back by then; where there is none, nobody waits for longer
RETRIED = (*BROKEN, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.DEADLINE_EXCEEDED)
ROLES = {
    RoleName.SHARD: admin_pb2.PROCESS_ROLE_SHARD,
    RoleName.WORKER: admin_pb2.PROCESS_ROLE_WORKER,
    RoleName.GATEWAY: admin_pb2.PROCESS_ROLE_GATEWAY,
}


class RestartTimeout(Exception):
    """A process did not come back in time; the message names it."""


class RestartClient(Protocol):
    """The part of AdminClient that is needed here."""

    def status(self) -> admin_pb2.GetStatusResponse:
        """The system now."""

    def restart(self, role: "admin_pb2.ProcessRole", rank: int) -> None:
        """Decides that a process is replaced."""


def restart(
    only: Annotated[RoleName | None, typer.Argument(help="Replace only these; unset: every process.")] = None,
    timeout_s: Annotated[
        float, typer.Option(callback=TIMEOUT, help="For one process to be replaced and ready, in seconds.")
    ] = 600.0,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Replace the processes one after another while requests run: shards, workers, gateways."""
    try:
        with AdminClient(address) as client:
            restart_all(client, only, timeout_s, lambda text: console.print(text, highlight=False))
    except grpc.RpcError as error:
        fail_call(error, address)
    except RestartTimeout as error:
        fail(str(error))


def restart_all(
    client: RestartClient,
    only: RoleName | None,
    timeout_s: float,
    show: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Raises RestartTimeout, and what a call fails with for another reason than that the system is not ready."""

    def until(wanted: Callable[[], T | None], name: str) -> T:
        deadline_s = clock() + timeout_s
        while (found := _answered(wanted)) is None:
            if clock() >= deadline_s:
                raise RestartTimeout(f"{name} was not replaced within {timeout_s:g} s; see `mobula status`")
            sleep(POLL_S)
        return found

    def first_status() -> admin_pb2.GetStatusResponse:
        deadline_s = clock() + FIRST_ANSWER_S
        while (status := _answered(client.status)) is None:
            sleep(POLL_S)
            if clock() >= deadline_s:
                return client.status()
        return status

    names = [process.name for process in first_status().processes]
    gateways = [name for name in names if name.startswith(RoleName.GATEWAY)]
    if len(gateways) == 1 and only in (None, RoleName.GATEWAY):
        show(f"{gateways[0]} is the only gateway: while it is replaced, new calls are refused for some seconds")
    for name in names:
        role, _, rank = name.rpartition("-")
        if only in (None, role):
            before = until(partial(_look, client, name), name)
            fate = before.fate or until(partial(_ask, client, RoleName(role), int(rank)), name)
            fate = fate or until(partial(_look, client, name, before.generation), name).fate
            show(f"{name} {fate}")


class Look(NamedTuple):
    """generation: the one that is there; fate: what became of the process, "" while there is more to do."""

    generation: str = ""
    fate: str = ""


def _look(client: RestartClient, name: str, before: str | None = None) -> Look | None:
    """None: look again. before: the generation that is replaced; None before it is asked for."""
    status = client.status()
    process = next((process for process in status.processes if process.name == name), None)
    if process is None:
        return Look(fate="has left meanwhile")
    if process.is_leaving:
        return Look(fate="is leaving, left alone")
    if not process.generation:
        return None
    if before is None:
        return Look(process.generation)
    return Look(fate="is replaced") if status.is_serving and process.generation != before else None


def _ask(client: RestartClient, role: RoleName, rank: int) -> str:
    """What became of it; "" when it is decided that it is replaced."""
    try:
        client.restart(ROLES[role], rank)
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.INVALID_ARGUMENT:
            raise
        return "has left or is leaving, left alone"
    return ""


def _answered(ask: Callable[[], T | None]) -> T | None:
    """None while the system is not ready, or its gateway is the process that is replaced."""
    try:
        return ask()
    except grpc.RpcError as error:
        if error.code() not in RETRIED:
            raise
        return None
