"""Whether one machine's memory takes more workers. On a cluster, Ray and Kubernetes know which node does."""

from collections.abc import Callable

import psutil

from cluster.byte_count import format_bytes
from protos.errors import InvalidRequest


def _free_bytes() -> int:
    return int(psutil.virtual_memory().available)


class WorkerRoom:
    """Of the machine on which all workers run."""

    def __init__(self, worker_bytes: int, free_bytes: Callable[[], int] = _free_bytes) -> None:
        """worker_bytes: of each: its weights, its latent cache and its libraries."""
        self._worker_bytes = worker_bytes
        self._free_bytes = free_bytes

    def check(self, count: int, num_there: int, num_starting: int) -> None:
        """Raises InvalidRequest where `count` workers would need more memory than is free.

        num_there: of them, the workers that are there. num_starting: of these, those whose memory still counts as free.
        """
        free = self._free_bytes()
        num_more = max(0, free // self._worker_bytes - num_starting)
        if count - num_there > num_more:
            raise InvalidRequest(
                f"count is {count}: each worker needs about {format_bytes(self._worker_bytes)} of memory, and "
                f"{format_bytes(free)} are free, {num_starting} of {num_there} workers still take theirs; ask for at "
                f"most {num_there + num_more}, or serve with a smaller attention_workers.engine.cache_gib or on more "
                "machines",
                field="count",
            )
