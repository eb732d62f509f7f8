"""The faults that `mobula chaos` knows by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cluster.chaos.fault import Fault
from cluster.chaos.faults.freeze import Slow, Stop
from cluster.chaos.faults.kill import Kill
from cluster.chaos.faults.link import Link, spoil
from cluster.chaos.proxy import Weather
from cluster.chaos.system import CONTROLLER
from cluster.controller.process import RoleName


@dataclass(frozen=True, slots=True)
class Scenario:
    """A fault by name. summary: one line for people. create: takes the run's seed."""

    summary: str
    create: Callable[[int], Fault]


CUT, DROP, SPOIL = Weather(is_cut=True), Weather(holds_answers=True), Weather(spoil=spoil)
DELAY = Weather(delay_s=0.05, loss=0.01)
TO_SHARD, TO_BOTH = (RoleName.SHARD,), (RoleName.SHARD, RoleName.WORKER)

SCENARIOS: Mapping[str, Scenario] = {
    "kill-shard": Scenario("kill -9 an expert shard", lambda seed: Kill(RoleName.SHARD)),
    "kill-worker": Scenario("kill -9 an attention worker", lambda seed: Kill(RoleName.WORKER)),
    "kill-gateway": Scenario("kill -9 a gateway", lambda seed: Kill(RoleName.GATEWAY)),
    "kill-controller": Scenario("kill -9 the controller", lambda seed: Kill(CONTROLLER)),
    "stop-shard": Scenario(
        "SIGSTOP an expert shard for 8 s: it hangs, its connections stand", lambda seed: Stop(RoleName.SHARD)
    ),
    "slow-shard": Scenario("an expert shard gets a twentieth of its time for 8 s", lambda seed: Slow(RoleName.SHARD)),
    "cut-link": Scenario("no worker reaches a shard for 8 s, which runs on", lambda seed: Link(CUT, TO_SHARD)),
    "drop-traffic": Scenario(
        "nothing comes back from a shard and a worker for 8 s, connections stand", lambda seed: Link(DROP, TO_BOTH)
    ),
    "delay-traffic": Scenario(
        "50 ms more to and from a shard and a worker for 8 s, 1 % of it lost and repeated",
        lambda seed: Link(DELAY, TO_BOTH, seed=seed),
    ),
    "corrupt-answer": Scenario("numbers in a shard's answers are none for 8 s", lambda seed: Link(SPOIL, TO_SHARD)),
}
