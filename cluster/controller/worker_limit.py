"""How many workers one machine's memory takes. On a cluster, Ray and Kubernetes know which node has room."""

from typing import NamedTuple

from cluster.byte_count import format_bytes
from cluster.config import WorkerScalingConfig
from protos.errors import InvalidRequest


class WorkerLimit(NamedTuple):
    """As the machine was before Mobula started: later, memory is free that running workers' caches will yet take."""

    max_count: int
    worker_bytes: int  # of one: its weights, its latent cache when it is full, its libraries

    def check(self, count: int) -> None:
        """Raises InvalidRequest for more workers than that."""
        if count > self.max_count:
            raise InvalidRequest(
                f"count is {count}: beside the shards this machine had memory for {self.max_count} workers of about "
                f"{format_bytes(self.worker_bytes)} when Mobula started; ask for at most {self.max_count}, or serve "
                "with a smaller latent cache (attention_workers.engine) or on a Ray cluster",
                field="count",
            )

    def applied_to(self, config: WorkerScalingConfig) -> WorkerScalingConfig:
        """Load asks for no more than that either."""
        max_count = min(config.max_count, self.max_count)
        return config.model_copy(update={"max_count": max_count, "min_count": min(config.min_count, max_count)})
