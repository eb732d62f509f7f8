"""The network between processes: cut, silent, slow, or changing what it carries.

Needs a deployment of its own, whose gRPC connections go through cluster/chaos/proxy.py. Shards are then reached through
gRPC alone: shared memory has no network in it.
"""

from collections.abc import Mapping
from pathlib import Path

from cluster.chaos.deployment import Surroundings
from cluster.chaos.fault import Fault
from cluster.chaos.faults.kill import victim
from cluster.chaos.proxy import CALM, LinkProxy, Weather
from cluster.chaos.system import ChaosRefused, System
from cluster.controller.process import RoleName

MIN_SPOILED_BYTES = 512  # a shorter chunk holds no rows
NOT_A_NUMBER = b"\xff" * 64  # in every type of weights and sums; misaligned too


class Link(Fault):
    """The links to a process of each of some roles have another weather for a while."""

    needs_own_deployment = True

    def __init__(
        self,
        weather: Weather,
        roles: tuple[RoleName, ...],
        seed: int,
        hold_s: float = 8.0,
        proxy: LinkProxy | None = None,
    ) -> None:
        """proxy: that the system goes through already; None to start one."""
        self.hold_s = hold_s
        self._weather = weather
        self._roles = roles
        self._seed = seed
        self._proxy = proxy or LinkProxy(seed)
        self._ports: list[int] = []

    def prepare(self, folder: Path) -> Surroundings:
        return through(self._proxy)

    def inject(self, system: System) -> Mapping[str, int]:
        status = system.status()
        if status is None:
            raise ChaosRefused("the controller does not say where processes listen")
        names = [victim(system, role, self._seed) for role in self._roles]
        self._ports = [int(health.address.rpartition(":")[2]) for name, health in status.processes if name in names]
        self._proxy.set_weather(self._ports, self._weather)
        return {}

    def heal(self, system: System) -> None:
        self._proxy.set_weather(self._ports, CALM)

    def close(self) -> None:
        self._proxy.close()


def through(proxy: LinkProxy) -> Surroundings:
    """What makes a system's gRPC go through a proxy, and everything through gRPC."""
    return Surroundings(
        settings={"attention_workers": {"router": {"shared_memory_mib": 0}}}, environment={"grpc_proxy": proxy.url}
    )


class CorruptAnswers(Link):
    """Answers of a shard have numbers that are none."""

    def __init__(self, seed: int) -> None:
        super().__init__(Weather(spoil=self._spoil), (RoleName.SHARD,), seed)
        self._num_spoiled = 0

    def heal(self, system: System) -> None:
        super().heal(system)
        self.notes += (f"{self._num_spoiled} pieces of answers were corrupted",)

    def _spoil(self, chunk: bytes) -> bytes:
        spoiled = spoil(chunk)
        self._num_spoiled += spoiled is not chunk
        return spoiled


def spoil(chunk: bytes) -> bytes:
    """The chunk, with numbers in its middle that are none."""
    if len(chunk) < MIN_SPOILED_BYTES:
        return chunk
    middle = len(chunk) // 2
    return chunk[:middle] + NOT_A_NUMBER + chunk[middle + len(NOT_A_NUMBER) :]
