"""A Ray cluster of this process's own, on this machine: it listens on loopback alone, and ends with its processes."""

import ipaddress
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private import ray_constants

from cluster.controller.controller import StartError

OBJECT_STORE_BYTES = 80 * 1024 * 1024  # no tensor passes through Ray's object store
RAY_FOLDER = str(Path(ray.__file__).parent)
KILLED_S = 5.0  # until a process that was killed is gone


def start_local_ray(num_cpus: int, **settings: Any) -> None:
    """settings: further ones of ray.init. Raises StartError."""
    # Ray takes the machine's outward address even when it is told 127.0.0.1, and every one of its servers listens
    # there or on all addresses. Unless it believes that there are no clusters, as on macOS and Windows.
    knows_clusters, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        _start(num_cpus, settings)
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = knows_clusters


def _start(num_cpus: int, settings: dict[str, Any]) -> None:
    address = ray.util.get_node_ip_address()
    if not ipaddress.ip_address(address).is_loopback:
        raise StartError(f"Ray {ray.__version__} would listen on {address}, where others reach it; install ray==2.60.0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 lets any other program starve ours
    # Who ends the whole process group ends Ray's server with it: then there is nothing to wait a minute for.
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "5")
    try:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            **settings,
        )
    except OSError as error:
        if error.filename is None or str(error.filename).startswith(RAY_FOLDER):  # its own programs
            raise StartError(f"Ray cannot start: {error}") from error
        raise StartError(
            f"Ray cannot write in {error.filename}: {error.strerror}; set RAY_TMPDIR to a folder where it can"
        ) from error


def end_local_ray() -> None:
    """Also what a start that was interrupted has left, and Ray's agents, which would look for its server for a minute
    more.
    """
    processes = _ray_processes()  # before they lose their parents
    ray.shutdown()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, KILLED_S)


def _ray_processes() -> list[psutil.Process]:
    """Those that Ray has started from this process, and theirs."""
    found: list[psutil.Process] = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if any(argument.startswith(RAY_FOLDER) for argument in child.cmdline()):
                found += [child, *child.children(recursive=True)]
    return found
