"""A running Mobula as chaos sees it: its front door, what the controller says of its processes, and their pids here.

Signals reach only processes of this machine and of this user. Knows nothing of load or of what is done to the system.
"""

import os
import signal
from collections.abc import Collection, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Self

import grpc
import psutil

from cluster.client import AdminClient
from cluster.client_access import ClientAccess
from cluster.controller.admin_messages import cluster_status
from cluster.controller.process import ClusterStatus, RoleName

CONTROLLER = "controller"
CONTROLLER_TITLE = "ray::Controller"  # how the process of its actor is named, as far as the kernel keeps names
RAYLET = "raylet"


class ChaosRefused(Exception):
    """This fault cannot be made here; the message says what it would need."""


class System:
    """Not thread-safe. Pids of processes are those of the latest answer, for the controller may be gone later."""

    def __init__(self, address: str, access: ClientAccess) -> None:
        """address: host:port of the gateway."""
        self.address = address
        self.access = access
        self._client = AdminClient(address, access)
        self._pids: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection; the system runs on."""
        self._client.close()

    def status(self) -> ClusterStatus | None:
        """What the controller says; None while gateway or controller do not answer."""
        try:
            status = cluster_status(self._client.status())
        except grpc.RpcError:
            return None
        self._pids |= {name: health.pid for name, health in status.processes if health.pid}
        return status

    def pids(self) -> Mapping[str, int]:
        """Of every process that the system is known to have, by name; raylets have theirs behind the name."""
        found = dict(self._pids)
        raylets = self._raylets()
        found |= {f"{RAYLET}-{raylet.pid}": raylet.pid for raylet in raylets}
        for raylet in raylets:
            for child in _descendants(raylet):
                with suppress(psutil.NoSuchProcess):
                    if child.name().startswith(CONTROLLER_TITLE):
                        found[CONTROLLER] = child.pid
        return found

    def members(self, role: RoleName | str) -> list[str]:
        """The names of a role's processes, in order."""
        return sorted((name for name in self.pids() if name.split("-")[0] == role), key=_rank)

    def send(self, name: str, number: signal.Signals) -> int:
        """Sends a signal to a process; its pid. Raises ChaosRefused when it is not one of this machine and user."""
        pids = self.pids()
        if name not in pids:
            raise ChaosRefused(f"no process {name} is found on this machine; there are: {', '.join(sorted(pids))}")
        try:
            os.kill(pids[name], number)
        except (ProcessLookupError, PermissionError) as error:
            raise ChaosRefused(
                f"cannot send {number.name} to {name}, pid {pids[name]}: {error.strerror}; run this on its machine, as "
                "its user"
            ) from error
        return pids[name]

    def cpu_seconds_beside(self, pids: Collection[int]) -> float:
        """CPU time that Ray's processes here have used so far, without these: what starting a process costs shows here.

        Ray keeps processes in store, so one that takes another's place may be older than the other's end.
        """
        total = 0.0
        for raylet in self._raylets():
            for process in _descendants(raylet):
                with suppress(psutil.NoSuchProcess):
                    times = process.cpu_times()
                    total += 0.0 if process.pid in pids else times.user + times.system
        return total

    def _raylets(self) -> list[psutil.Process]:
        """Those that have a known process as a child."""
        raylets = {}
        for pid in self._pids.values():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                parent = psutil.Process(pid).parent()
                if parent is not None and parent.name() == RAYLET:
                    raylets[parent.pid] = parent
        return [raylets[pid] for pid in sorted(raylets)]


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return list(process.children(recursive=True))
    return []


def _rank(name: str) -> int:
    _, _, rank = name.partition("-")
    return int(rank) if rank else 0
