"""`mobula restart`: every process is replaced, one after another, while requests run."""

import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Protocol

import grpc
import typer

from cluster.client import DEFAULT_ADDRESS, AdminClient
from cluster.commands.arguments import Address
from cluster.commands.terminal import console, fail, fail_call
from cluster.controller.process import RoleName
from protos import admin_pb2

POLL_S = 0.5
RETRIED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.DEADLINE_EXCEEDED)
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
    timeout_s: Annotated[float, typer.Option(help="For one process to be replaced and ready, in seconds.")] = 600.0,
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

    def until(wanted: Callable[[], bool], name: str) -> None:
        deadline_s = clock() + timeout_s
        while not wanted():
            if clock() >= deadline_s:
                raise RestartTimeout(f"{name} was not replaced within {timeout_s:g} s; see `mobula status`")
            sleep(POLL_S)

    for process in client.status().processes:
        role = RoleName(process.name.rpartition("-")[0])
        if only in (None, role):
            try:
                until(partial(_asked_for, client, role, process), process.name)
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.INVALID_ARGUMENT:
                    raise
                show(f"{process.name} has left meanwhile")
                continue
            until(partial(_is_replaced, client, process), process.name)
            show(f"{process.name} is replaced")


def _asked_for(client: RestartClient, role: RoleName, process: admin_pb2.ProcessStatus) -> bool:
    return _done(lambda: client.restart(ROLES[role], int(process.name.rpartition("-")[2])))


def _is_replaced(client: RestartClient, before: admin_pb2.ProcessStatus) -> bool:
    def look() -> bool:
        status = client.status()
        generations = {process.name: process.generation for process in status.processes}
        return status.is_serving and generations.get(before.name, "") not in ("", before.generation)

    return _done(look)


def _done(ask: Callable[[], bool | None]) -> bool:
    """Whether it was done: not while the system is not ready, or its gateway is the process that is replaced."""
    try:
        return ask() is not False
    except grpc.RpcError as error:
        if error.code() not in RETRIED:
            raise
        return False
