"""The faults that `mobula chaos` knows by name."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cluster.chaos.fault import Fault
from cluster.chaos.faults.clock import ClockJump
from cluster.chaos.faults.disk import FillDisk
from cluster.chaos.faults.freeze import Slow, Stop
from cluster.chaos.faults.kill import Kill
from cluster.chaos.faults.link import CorruptAnswers, Link
from cluster.chaos.faults.raylet import KillRaylet
from cluster.chaos.proxy import Weather
from cluster.chaos.system import CONTROLLER
from cluster.controller.process import RoleName


@dataclass(frozen=True, slots=True)
class Scenario:
    """A fault by name. summary: one line for people. create: takes the run's seed."""

    summary: str
    create: Callable[[int], Fault]


CUT, DROP = Weather(is_cut=True), Weather(holds_answers=True)
DELAY = Weather(delay_s=0.05, loss=0.01)
TO_SHARD, TO_BOTH = (RoleName.SHARD,), (RoleName.SHARD, RoleName.WORKER)
RANDOM = "random"


def _drawn(seed: int) -> Fault:
    """Any of the others."""
    name = random.Random(seed).choice([name for name in SCENARIOS if name != RANDOM])
    fault = SCENARIOS[name].create(seed)
    fault.notes = (f"drawn: {name}",)
    return fault


SCENARIOS: Mapping[str, Scenario] = {
    "kill-shard": Scenario("kill -9 an expert shard", lambda seed: Kill(RoleName.SHARD, seed)),
    "kill-worker": Scenario("kill -9 an attention worker", lambda seed: Kill(RoleName.WORKER, seed)),
    "kill-gateway": Scenario("kill -9 a gateway", lambda seed: Kill(RoleName.GATEWAY, seed)),
    "kill-controller": Scenario("kill -9 the controller", lambda seed: Kill(CONTROLLER, seed)),
    "kill-raylet": Scenario(
        "kill -9 a node's raylet and so all that runs there; another node joins", lambda seed: KillRaylet()
    ),
    "stop-shard": Scenario(
        "SIGSTOP an expert shard for 8 s: it hangs, its connections stand", lambda seed: Stop(RoleName.SHARD, seed)
    ),
    "stop-worker": Scenario("SIGSTOP an attention worker for 8 s", lambda seed: Stop(RoleName.WORKER, seed)),
    "slow-shard": Scenario(
        "an expert shard gets a twentieth of its time for 8 s", lambda seed: Slow(RoleName.SHARD, seed)
    ),
    "cut-link": Scenario("no worker reaches a shard for 8 s, which runs on", lambda seed: Link(CUT, TO_SHARD, seed)),
    "drop-traffic": Scenario(
        "nothing comes back from a shard and a worker for 8 s, connections stand",
        lambda seed: Link(DROP, TO_BOTH, seed),
    ),
    "delay-traffic": Scenario(
        "50 ms more to and from a shard and a worker for 8 s, 1 % of it lost and repeated",
        lambda seed: Link(DELAY, TO_BOTH, seed),
    ),
    "corrupt-answer": Scenario("numbers in a shard's answers are none for 8 s", CorruptAnswers),
    "full-disk": Scenario("the disk of Ray's files and logs is full for 8 s", lambda seed: FillDisk()),
    "clock-jump": Scenario("the wall clock jumps an hour ahead, 8 s later back", lambda seed: ClockJump()),
    RANDOM: Scenario("one of the others, drawn by --seed", _drawn),
}
