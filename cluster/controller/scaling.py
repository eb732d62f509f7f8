"""The number of processes of a role follows their load. Belongs to the controller's thread.

Every `LOOK_S` their load is measured (shard_usage.py, worker_usage.py). What is decided (autoscale.py) is carried out
by the role's membership. While processes come or leave, or units move, nothing is measured. Knows nothing of Ray.
"""

import logging
from collections.abc import Callable
from typing import NamedTuple, Protocol

from cluster.config import ScalingConfig
from cluster.controller.autoscale import CountDecision
from cluster.controller.membership import MemberChange
from cluster.controller.memory_budget import MemoryRoom
from cluster.controller.process import RoleName
from protos.errors import MobulaError

logger = logging.getLogger(__name__)

LOOK_S = 5.0  # between two looks; short beside the windows
ANSWER_TIMEOUT_S = 2.0  # a process that takes longer is looked at the next time


class Usage(NamedTuple):
    """How loaded the processes of a role are: each measure over its target, by name."""

    num_processes: int
    ratios: dict[str, float]


class UsageMeter(Protocol):
    """Of one role."""

    def look(self, seconds: float) -> Usage | None:
        """The load of the `seconds` since the look before; None where that cannot be said."""

    def forget(self) -> None:
        """What was measured before says nothing now."""


class Scaling:
    """Of one role."""

    def __init__(
        self,
        role: RoleName,
        config: ScalingConfig,
        meter: UsageMeter,
        scale: Callable[[int], MemberChange],
        clock: Callable[[], float],
        room: MemoryRoom,
    ) -> None:
        """scale: from now on so many; raises MobulaError where that cannot be."""
        self._role = role
        self._config = config
        self._meter = meter
        self._change = scale
        self._clock = clock
        self._room = room
        self._decision = CountDecision(config)
        self._looked_s = float("-inf")

    def round(self, *, is_settled: bool) -> None:
        """is_settled: every process serves, none comes or leaves, and no units move."""
        if not self._config.enabled:
            return
        if not is_settled:
            self._meter.forget()
            self._decision.forget()
            return
        now_s = self._clock()
        if now_s - self._looked_s < LOOK_S:
            return
        seconds, self._looked_s = now_s - self._looked_s, now_s
        if (usage := self._meter.look(seconds)) is not None:
            self._scale(now_s, usage)

    def _scale(self, now_s: float, usage: Usage) -> None:
        wanted = self._decision.decide(now_s, usage.num_processes, list(usage.ratios.values()))
        if wanted > usage.num_processes:
            wanted = max(usage.num_processes, self._room.at_most(self._role, wanted))
        if wanted == usage.num_processes:
            return
        why = ", ".join(f"{name} is {ratio:.2f} of its target" for name, ratio in usage.ratios.items())
        logger.info("from %d to %d %ss: %s", usage.num_processes, wanted, self._role, why)
        self._decision.forget()
        try:
            self._change(wanted)
        except MobulaError as error:
            logger.warning("no change of the number of %ss: %s", self._role, error)
