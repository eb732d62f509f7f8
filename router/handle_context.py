"""What the handles of a worker share with their router."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from router.completions import Completions
from router.metrics import RouterMetrics
from router.router_config import RouterConfig
from router.routing import Candidates, Routing
from router.shard_ledger import ShardLedger


@dataclass(frozen=True, slots=True, kw_only=True)
class HandleContext:
    """A router's parts, as its handles use them.

    routing: the newest placement. handles_by_version: how many handles were planned under each placement version; the
        engine thread writes, any thread reads.
    """

    config: RouterConfig
    metrics: RouterMetrics
    completions: Completions
    routing: Callable[[], Routing]
    sequence_numbers: Iterator[int]
    candidates: Candidates
    handles_by_version: dict[int, int]
    ledger: ShardLedger
    clock: Callable[[], float] = time.monotonic
