"""What the controller knows of one process of the system, and how it calls it. Knows nothing of Ray."""

import logging
import secrets
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

from cluster.controller.rebalance import RebalanceStatus

logger = logging.getLogger(__name__)


class RoleName(StrEnum):
    """The kinds of processes that the controller starts."""

    SHARD = "shard"
    WORKER = "worker"
    GATEWAY = "gateway"


RESTARTS = "ends, and is started again"  # details of ready processes that are told to end
DRAINS = "is drained: "  # and what becomes of what it holds


class ProcessState(StrEnum):
    """Where a process stands in its life."""

    STARTING = "starting"  # has not answered yet
    NEW = "new"  # runs, has neither weights nor a port
    LOADING = "loading"
    READY = "ready"  # has its weights and answers calls
    FAILED = "failed"  # could not load; `detail` says why
    DOWN = "down"  # did not answer the controller


class Quarantine(NamedTuple):
    """What a process does not trust: a shard as a whole, or its replica of one unit. reason: for people."""

    ep_rank: int
    layer_id: int | None
    unit_id: int | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessHealth:
    """A process about itself.

    Attributes:
        generation: differs between a process and the one that replaced it.
        replaced_generation: the latest before it that was told to end so that another one takes its place; "" if none.
        address: host:port of its gRPC server, once READY.
        metrics_address: host:port of its Prometheus endpoint, once READY.
        detail: what it is doing, or why it failed.
        must_leave: its node is about to end.
        is_leaving: it was told that it is drained; a controller that starts later goes on with that.
        is_stopping: it was told to stop, and takes nothing new.
        domain: failure domain that the process runs in, its node or zone; "" if not known.
        weight_bytes: weights kept in memory.
        num_units: placement units that a shard holds.
        quarantines: by a shard of its own units, by a worker of shards and their units.
        peak_rss_bytes: largest resident set since the process started.
        load_rss_bytes: how much the resident set grew at most while the weights were read.
        placement_version, oldest_placement_version: that a worker knows, and under which a forward is under way; 0 for
            other processes.
    """

    generation: str
    state: ProcessState
    address: str = ""
    metrics_address: str = ""
    detail: str = ""
    replaced_generation: str = ""
    pid: int = 0
    must_leave: bool = False
    is_leaving: bool = False
    is_stopping: bool = False
    domain: str = ""
    weight_bytes: int = 0
    num_units: int = 0
    quarantines: tuple[Quarantine, ...] = ()
    peak_rss_bytes: int = 0
    load_rss_bytes: int = 0
    placement_version: int = 0
    oldest_placement_version: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStatus:
    """The system at one moment.

    Attributes:
        processes: (name, health) in the order shards, workers, gateways.
        is_serving: every process is ready and knows the others.
    """

    processes: tuple[tuple[str, ProcessHealth], ...]
    is_serving: bool
    placement_version: int
    rebalance: RebalanceStatus = field(default_factory=RebalanceStatus)

    @property
    def failures(self) -> list[str]:
        return [f"{name}: {health.detail}" for name, health in self.processes if health.state is ProcessState.FAILED]


STARTING = ProcessHealth(generation="", state=ProcessState.STARTING)
DOWN = ProcessHealth(generation="", state=ProcessState.DOWN, detail="does not answer")


def new_generation() -> str:
    """A name for this run of a process."""
    return secrets.token_hex(4)


class ProcessHandle(Protocol):
    """A remote process."""

    def call(self, method: str, *args: Any) -> Future[Any]:
        """Starts a method of the process's role. The future raises ProcessDied if the process is gone."""

    def restart(self) -> None:
        """Ends the process at once; another generation takes its place."""

    def kill(self) -> None:
        """Ends the process at once; it is not started again."""


STOP_SLACK_S = 5.0  # that a process may take to stop beyond the time that its requests have


class ProcessDied(Exception):
    """The process ended or cannot be reached; it may come back as another generation."""


@dataclass(slots=True)
class ManagedProcess:
    """The controller's record of one process. Written by the controller's thread only."""

    role: RoleName
    rank: int
    handle: ProcessHandle
    health: ProcessHealth = STARTING
    address: str = ""  # host:port of the latest generation that was ready; stays known while the process is away
    loading: Future[Any] | None = None
    restart_at_s: float = 0.0  # if it has failed; a moment of the controller's clock
    pending_health: Future[ProcessHealth] | None = None
    asked_at_s: float = 0.0  # first for the health that it has not given yet; a moment of the controller's clock
    told: tuple[str, object] | None = None  # its generation when it was last told something, and what
    failures: dict[str, str] = field(default_factory=dict)  # by method: what the last call raised
    ready_at_s: float | None = None  # when it was seen so last; a moment of the controller's clock
    is_lost: bool = False  # a shard that was ready and is gone for so long that others take over its units
    is_leaving: bool = False  # a shard that gives up its units, or a worker its requests, and then ends
    is_joining: bool = False  # a worker that was added while the system serves: nobody waits for it
    join_by_s: float | None = None  # else a joining worker is given up; a moment of the controller's clock
    is_replaced: bool = False  # it is to end, and another generation to take its place
    is_next_awaited: bool = False  # it was ended for that, and the next one has not answered yet
    replaced_generation: str = ""  # the latest that was ended for that
    stopping: Future[Any] | None = None  # once it was told to end
    stop_by_s: float = 0.0  # else it is killed; a moment of the controller's clock

    @property
    def name(self) -> str:
        return f"{self.role}-{self.rank}"

    @property
    def is_ready(self) -> bool:
        return self.health.state is ProcessState.READY

    @property
    def is_ending(self) -> bool:
        """Whether nothing new should be given to it."""
        return self.is_leaving or self.is_replaced

    @property
    def cannot_say(self) -> bool:
        """Whether its latest health was an error of its own."""
        return self.health.state is ProcessState.DOWN and self.health != DOWN

    @property
    def hangs(self) -> bool:
        """Whether it lives and has given no health since `asked_at_s`."""
        return self.cannot_say or (self.health == DOWN and self.pending_health is not None)

    @contextmanager
    def forgiven(self, method: str) -> Iterator[None]:
        """What a call of `method` raises within is logged and goes no further: the others are looked after too.

        Logged when it changes only, for what lasts comes again each round.
        """
        try:
            yield
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
            if failure != self.failures.get(method):
                is_own = not isinstance(error, (ProcessDied, TimeoutError))
                logger.warning("%s did not answer %s: %s", self.name, method, failure, exc_info=is_own)
            self.failures[method] = failure
        else:
            self.failures.pop(method, None)

    def leave(self) -> None:
        """It is drained from now on. It keeps that in mind too, for a controller after this one."""
        self.is_leaving, self.is_replaced = True, False
        self.handle.call("leave")  # one that is gone has nothing to keep

    def go_on_with_departure(self) -> None:
        """What a controller before this one has begun. One that it told to stop, and nothing else, is replaced."""
        self.is_leaving = self.is_leaving or self.health.is_leaving
        if self.health.is_stopping and self.stopping is None and not self.is_ending:
            self.is_replaced = True

    def has_stopped(self, drain_timeout_s: float, now_s: float) -> bool:
        """Whether it did what the first of these calls tells it, or has had its time."""
        if self.stopping is None:
            self.stopping = self.handle.call("stop", drain_timeout_s)
            self.stop_by_s = now_s + drain_timeout_s + STOP_SLACK_S
            return False
        return self.stopping.done() or now_s >= self.stop_by_s

    @property
    def is_connected(self) -> bool:
        """Whether this very process, and not one before it, knows the others."""
        return self.is_ready and self.told is not None and self.told[0] == self.health.generation

    @property
    def told_version(self) -> int | None:
        """Of the placement that a worker was told last; None for one that was told none."""
        news = self.told[1] if self.told else None
        return news[0] if isinstance(news, tuple) and isinstance(news[0], int) else None
