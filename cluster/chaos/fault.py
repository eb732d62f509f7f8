"""A fault: what is done to a running system, and undone. Each kind is a class in cluster/chaos/faults."""

from collections.abc import Mapping
from pathlib import Path

from cluster.chaos.deployment import Surroundings
from cluster.chaos.system import System


class Fault:
    """Used once, in the order of its methods.

    hold_s: between `inject` and `heal`; 0 for one that is over at once, as a kill.
    needs_own_deployment: whether `prepare` must run before the system starts.
    notes: what is to be said of it beside the figures.
    """

    hold_s: float = 0.0
    needs_own_deployment: bool = False
    notes: tuple[str, ...] = ()

    def prepare(self, folder: Path) -> Surroundings:
        """What the system is to be started with. folder: exists, the run's own."""
        return Surroundings()

    def inject(self, system: System) -> Mapping[str, int]:
        """Does it. The processes that other ones must replace, by name, with their pids. Raises ChaosRefused."""
        raise NotImplementedError

    def heal(self, system: System) -> None:
        """Undoes what does not pass by itself. Also called when a run is cut off after `inject`."""

    def close(self) -> None:
        """Lets go of what `prepare` made, after the system has ended."""
