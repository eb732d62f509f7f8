"""A full disk: nothing can be written where logs, sockets' folders and what Ray spills lie.

Needs a deployment of its own, in a mount namespace with a small disk at the place of Ray's files: for root, or where
users may have namespaces of their own.
"""

import errno
import os
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from cluster.chaos.deployment import Surroundings
from cluster.chaos.fault import Fault
from cluster.chaos.system import ChaosRefused, System

DISK_MIB = 64
CHUNK_BYTES = 2**20
RAY_FOLDER = "ray"  # that Ray makes in its temporary folder
MOUNT = f'mount -t tmpfs -o size={DISK_MIB}m mobula-chaos "$0" && exec "$@"'


class FillDisk(Fault):
    """Fills it to the last byte for a while."""

    hold_s = 8.0
    needs_own_deployment = True

    def __init__(self) -> None:
        self._disk = Path()
        self._filling: Path | None = None

    def prepare(self, folder: Path) -> Surroundings:
        self._disk = folder / RAY_FOLDER
        self._disk.mkdir()
        unshare = _unshare()
        try:
            subprocess.run([*unshare, "sh", "-c", MOUNT, str(self._disk), "true"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", b"") or str(error).encode()
            raise ChaosRefused(
                f"no small disk can be mounted here: {said.decode().strip()}; run as root, or allow user namespaces"
            ) from error
        return Surroundings(command=(*unshare, "sh", "-c", MOUNT, str(self._disk)))

    def inject(self, system: System) -> Mapping[str, int]:
        pid = next(iter(system.pids().values()))
        self._filling = Path(f"/proc/{pid}/root{self._disk}/filling")
        fill(self._filling)
        return {}

    def heal(self, system: System) -> None:
        if self._filling is not None:
            with suppress(FileNotFoundError):
                self._filling.unlink()


def fill(path: Path) -> int:
    """Writes a file until the disk has no byte left. Its size. Other errors than that are raised."""
    size, chunk = 0, CHUNK_BYTES
    with path.open("wb", buffering=0) as file:
        while chunk:
            try:
                size += file.write(bytes(chunk))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                chunk //= 2
    return size


def _unshare() -> tuple[str, ...]:
    """Runs what follows in a mount namespace of its own. Raises ChaosRefused where there is no such program."""
    program = shutil.which("unshare")
    if program is None:
        raise ChaosRefused("`unshare` of util-linux is not installed, which a small disk needs")
    as_root = () if os.geteuid() == 0 else ("--map-root-user",)
    return (program, *as_root, "--mount", "--propagation", "private")
