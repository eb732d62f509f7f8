"""Which faults come, and when: one every so many seconds, drawn by seed.

A gateway that is killed takes its clients' connections along; they ask another one for the rest of their answers.
"""

import random
from collections.abc import Callable, Iterator, Mapping

from cluster.chaos.catalog import CUT, DELAY, DROP, TO_BOTH, TO_SHARD
from cluster.chaos.fault import Fault
from cluster.chaos.faults.freeze import Slow, Stop
from cluster.chaos.faults.kill import Kill
from cluster.chaos.faults.link import Link
from cluster.chaos.proxy import LinkProxy
from cluster.chaos.system import CONTROLLER
from cluster.controller.process import RoleName

HOLD_S = 5.0


def faults(seed: int, proxy: LinkProxy) -> Iterator[tuple[str, Fault]]:
    """Without end, by name. proxy: that the system's links go through."""
    rng = random.Random(seed)
    kinds: Mapping[str, Callable[[int], Fault]] = {
        "kill-shard": lambda number: Kill(RoleName.SHARD, number),
        "kill-worker": lambda number: Kill(RoleName.WORKER, number),
        "kill-gateway": lambda number: Kill(RoleName.GATEWAY, number),
        "kill-controller": lambda number: Kill(CONTROLLER, number),
        "stop-shard": lambda number: Stop(RoleName.SHARD, number, HOLD_S),
        "stop-worker": lambda number: Stop(RoleName.WORKER, number, HOLD_S),
        "slow-shard": lambda number: Slow(RoleName.SHARD, number, hold_s=HOLD_S),
        "cut-link": lambda number: Link(CUT, TO_SHARD, number, HOLD_S, proxy),
        "drop-traffic": lambda number: Link(DROP, TO_BOTH, number, HOLD_S, proxy),
        "delay-traffic": lambda number: Link(DELAY, TO_BOTH, number, HOLD_S, proxy),
    }
    while True:
        name = rng.choice(list(kinds))
        yield name, kinds[name](rng.randrange(1000))
