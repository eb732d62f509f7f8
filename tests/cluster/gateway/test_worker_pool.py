"""Which worker gets the next call."""

import asyncio

import pytest

from cluster.gateway.request_cost import CostModel, RequestCost
from cluster.gateway.worker_pool import WorkerPool
from protos.errors import Unavailable

LONG, SHORT = RequestCost(4000.0, 100.0), RequestCost(10.0, 100.0)


def pool_of(count: int) -> WorkerPool:
    pool = WorkerPool()
    for rank in range(count):
        pool.workers[rank] = pool._connection(rank, f"127.0.0.1:{rank + 1}")
    return pool


def test_a_worker_with_a_long_prompt_before_it_is_left_to_it() -> None:
    async def scenario() -> None:
        pool = pool_of(2)
        with pool.workers[0].occupied(LONG) as occupancy, pool.workers[1].occupied(SHORT):
            assert pool.choose(mean_tokens=100.0).dp_rank == 1  # two short ones are less than a long one
            occupancy.begin()  # the prompt is computed: what is left is alike
            assert pool.choose(mean_tokens=100.0).dp_rank == 0
        assert [(worker.num_in_flight, worker.pending_tokens) for worker in pool.workers.values()] == [(0, 0.0)] * 2
        with pytest.raises(Unavailable, match="none of 2"):
            pool.choose(list(pool.workers.values()))
        await pool.close()

    asyncio.run(scenario())


def test_places_are_what_a_worker_computes_at_once_and_its_cache_holds() -> None:
    async def scenario() -> None:
        pool = pool_of(2)
        for worker in pool.workers.values():
            worker.max_num_seqs, worker.num_cache_tokens = 32, 6400
        assert pool.num_places(mean_tokens=100.0) == 2 * (32 + 4)
        assert pool.num_places(mean_tokens=800.0) == 2 * (8 + 1)
        assert pool.num_places(mean_tokens=10_000.0) == 2 * (1 + 1)
        assert WorkerPool().num_places(100.0) is None
        await pool.close()

    asyncio.run(scenario())


def test_what_requests_cost_is_learned_from_those_that_ended() -> None:
    costs = CostModel()
    assert costs.estimate(400) == RequestCost(100.0, 128.0)
    for _ in range(200):
        costs.learn_tokens(400, 200, 20)
        costs.learn_time(RequestCost(200.0, 20.0), 2.2)
    assert costs.estimate(400) == pytest.approx(RequestCost(200.0, 20.0), rel=0.01)
    assert costs.mean_tokens == pytest.approx(220.0, rel=0.01)
    assert costs.seconds_per_token == pytest.approx(0.01)
