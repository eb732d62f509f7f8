"""kill -9: a process is gone without a word, as in a crash or when memory ran out."""

import signal
from collections.abc import Mapping

from cluster.chaos.fault import Fault
from cluster.chaos.system import ChaosRefused, System


class Kill(Fault):
    """Of the processes of a role, one by seed."""

    def __init__(self, role: str, seed: int) -> None:
        self._role = role
        self._seed = seed

    def inject(self, system: System) -> Mapping[str, int]:
        name = victim(system, self._role, self._seed)
        return {name: system.send(name, signal.SIGKILL)}


def victim(system: System, role: str, seed: int) -> str:
    """The process of a role that a fault meets. Raises ChaosRefused when there is none."""
    members = system.members(role)
    if not members:
        raise ChaosRefused(f"no {role} of this system is found on this machine")
    return members[seed % len(members)]
