"""Whether somebody answers at the address of a Ray cluster. Ray itself looks for minutes, in words of its own parts."""

import os
import socket

from ray._private import services

from cluster.config import RAY_AUTO, ray_host_and_port

TIMEOUT_S = 3.0
WAY_OUT = (
    "is `ray start --head` running there, and is this its port (6379 unless it was told another one, 10001 behind "
    "ray://)? Leave ray.address out to start a cluster on this machine"
)


def check_answers(address: str) -> None:
    """address: as the configuration takes it. Raises ConnectionError with the reason and the way out."""
    found: str | None = address
    whose = ""
    if address == RAY_AUTO:
        found, whose = os.environ.get("RAY_ADDRESS", RAY_AUTO), "RAY_ADDRESS"
    if found in ("", RAY_AUTO):
        found, whose = services.canonicalize_bootstrap_address(RAY_AUTO), "the latest that was started here"
    if found is None:
        raise ConnectionError("no Ray runs on this machine: `ray start --head` starts one; or leave ray.address out")
    where = ray_host_and_port(found)
    if where is None:
        raise ConnectionError(
            f"RAY_ADDRESS is {found!r}, must be HOST:PORT or ray://HOST:PORT; unset it, or give a PORT of 1 to 65535"
        )
    try:
        socket.create_connection(where, TIMEOUT_S).close()
    except OSError as error:
        is_late = isinstance(error, TimeoutError)
        reason = f"no answer in {TIMEOUT_S:g} s" if is_late else (error.strerror or str(error)).lower()
        who = f"{found} ({whose}): " if whose else ""
        raise ConnectionError(f"{who}{reason}; {WAY_OUT}") from error
