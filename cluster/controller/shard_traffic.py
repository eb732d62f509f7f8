"""What each shard computed of late, and how fast, from the counters that shards keep. For the controller's thread.

An assignment counts half after each half-life. Memory is one [num_moe_layers, n_routed_experts] array for each shard
and one for its newest counters.
"""

import math
from dataclasses import dataclass

import numpy as np

from experts.load_snapshot import LoadSnapshot
from router.balance_terms import Float64Array, Traffic
from router.expert_map import ExpertMap

ROWS_PER_READ = 16  # rows through an expert cost about as much as reading its weights once
MIN_COMPUTE_S = 1.0  # of late, for a shard's speed to mean anything
SPEED_STEP = 2.0  # speeds are told apart by factors of this: closer ones differ by their load as much as by machine


@dataclass(slots=True)
class _Shard:
    """Decayed sums of one process."""

    source: str
    newest: LoadSnapshot
    num_tokens: Float64Array
    num_rows: Float64Array
    work: float = 0.0
    compute_s: float = 0.0
    observed_s: float = 0.0


class ShardTraffic:
    """`observe` as often as counters come; `traffic` and `speeds` say what they amount to."""

    def __init__(self, half_life_s: float) -> None:
        self._half_life_s = half_life_s
        self._shards: dict[int, _Shard] = {}

    def observe(self, ep_rank: int, source: str, counters: LoadSnapshot, now_s: float) -> None:
        """source: the process; counters of another one begin anew. The first look sets where counting begins."""
        shard = self._shards.get(ep_rank)
        if shard is None or shard.source != source:
            zeros = np.zeros(counters.num_tokens.shape)
            self._shards[ep_rank] = _Shard(source, counters, zeros, zeros[:, 0].copy(), observed_s=now_s)
            return
        before, shard.newest = shard.newest, counters
        decay = 0.5 ** (max(0.0, now_s - shard.observed_s) / self._half_life_s)
        shard.observed_s = now_s
        shard.num_tokens = shard.num_tokens * decay + (counters.num_tokens - before.num_tokens)
        shard.num_rows = shard.num_rows * decay + (counters.rows_by_layer - before.rows_by_layer)
        shard.compute_s = shard.compute_s * decay + (counters.compute_ns - before.compute_ns) / 1e9
        shard.work = shard.work * decay + _work(counters) - _work(before)

    def traffic(self, expert_map: ExpertMap) -> Traffic:
        """Of the shards of the map; its arrays are not written to again."""
        shards = {rank: shard for rank, shard in self._shards.items() if rank in expert_map.ep_ranks}
        return Traffic(
            expert_map=expert_map,
            num_tokens={rank: shard.num_tokens for rank, shard in shards.items()},
            num_rows={rank: shard.num_rows for rank, shard in shards.items()},
        )

    def speeds(self) -> dict[int, float]:
        """Of the shards that computed enough, as powers of SPEED_STEP around the median.

        Work is counted in experts' weights read and rows computed, so that a shard with larger batches is not taken for
        a faster one.
        """
        rates = {
            rank: shard.work / shard.compute_s
            for rank, shard in self._shards.items()
            if shard.compute_s >= MIN_COMPUTE_S and shard.work > 0
        }
        if not rates:
            return {}
        median = float(np.median(list(rates.values())))
        return {rank: SPEED_STEP ** round(math.log(rate / median, SPEED_STEP)) for rank, rate in rates.items()}

    def keep(self, ep_ranks: set[int]) -> None:
        """Forgets all other shards."""
        self._shards = {rank: shard for rank, shard in self._shards.items() if rank in ep_ranks}


def _work(counters: LoadSnapshot) -> float:
    """In readings of an expert's weights."""
    return counters.num_experts_read + counters.num_assignments / ROWS_PER_READ
