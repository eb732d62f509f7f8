"""kill -9: a process is gone without a word, as in a crash or when memory ran out."""

import signal
from collections.abc import Mapping

from cluster.chaos.fault import Fault
from cluster.chaos.system import ChaosRefused, System


class Kill(Fault):
    """Of the processes of a role, the last one."""

    def __init__(self, role: str) -> None:
        self._role = role

    def inject(self, system: System) -> Mapping[str, int]:
        name = last_of(system, self._role)
        return {name: system.send(name, signal.SIGKILL)}


def last_of(system: System, role: str) -> str:
    """The process of a role that faults meet. Raises ChaosRefused when there is none."""
    members = system.members(role)
    if not members:
        raise ChaosRefused(f"no {role} of this system is found on this machine")
    return members[-1]
