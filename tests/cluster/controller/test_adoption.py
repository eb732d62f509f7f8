"""A controller that starts among processes that another one left."""

from concurrent.futures import Future
from dataclasses import replace

import pytest

from cluster.controller.balance import Proposer
from cluster.controller.process import ProcessDied, RoleName
from cluster.controller.rebalance import RebalanceCause
from tests.cluster.controller.test_membership import drained_under, evenly
from tests.cluster.fake_processes import controller_of, run, system
from tests.fake_experts import grouped_gate, random_placement

MOVED = replace(random_placement(grouped_gate(), 2, seed=1), placement_version=9)


def test_what_runs_is_taken_over_as_it_is() -> None:
    first, fakes = system()
    run(first, 4)
    generations = {name: fake.generation for name, fake in fakes.items()}
    second = controller_of(fakes, num_shards=2)
    second.admin_address = "127.0.0.1:8"
    run(second, 3)
    assert second.status().is_serving
    assert {name: fake.generation for name, fake in fakes.items()} == generations
    assert all(len(fake.told("load")) == 1 for fake in fakes.values())
    assert fakes["gateway-0"].told("update_members")[-1][2] == "127.0.0.1:8"


def test_the_placement_that_a_worker_knows_goes_on() -> None:
    first, fakes = system()
    run(first, 4)
    for name in ("worker-0", "worker-1"):
        fakes[name].answers["expert_map"] = MOVED
    fakes["worker-1"].placement_version = 9  # worker 0 was not told before the first controller died
    second = controller_of(fakes, num_shards=2)
    run(second, 3)
    assert second.status().placement_version == 9
    assert fakes["worker-0"].placement_version == 9
    ((told,),) = fakes["shard-0"].told("serve_only")[-1:]
    assert told.placement_version == 9


def test_a_worker_that_cannot_say_which_placement_it_knows_keeps_no_other_from_saying_it() -> None:
    first, fakes = system()
    run(first, 4)
    for name in ("worker-0", "worker-1"):
        fakes[name].placement_version = 9
        fakes[name].answers["expert_map"] = MOVED
    fakes["worker-0"].answers["expert_map"] = ProcessDied("killed")
    second = controller_of(fakes, num_shards=2)
    run(second, 3)
    assert second.status().placement_version == 9
    assert second.status().is_serving


def test_nobody_is_told_of_an_older_placement_while_no_worker_can_say_the_newest(
    caplog: pytest.LogCaptureFixture,
) -> None:
    first, fakes = system()
    run(first, 4)
    fakes["worker-1"].placement_version = 9
    fakes["worker-1"].answers["expert_map"] = ValueError("a fault of its own")
    fakes["shard-0"].restart()
    for fake in fakes.values():
        fake.calls.clear()
    second = controller_of(fakes, num_shards=2)
    run(second, 4)
    assert {method for fake in fakes.values() for method, _ in fake.calls} == {"health", "expert_map"}
    assert caplog.text.count("Traceback") == 1
    fakes["worker-1"].answers["expert_map"] = MOVED
    run(second, 4)
    assert [told.placement_version for (told,) in fakes["shard-0"].told("load")] == [9]
    assert second.status().is_serving


def test_shards_keep_what_an_added_worker_still_computes_with() -> None:
    first, fakes = system(num_workers=3)
    run(first, 4)
    fakes["shard-0"].calls.clear()
    for name in ("worker-0", "worker-1", "worker-2"):
        fakes[name].placement_version = 9
        fakes[name].answers["expert_map"] = MOVED
    fakes["worker-2"].oldest_placement_version = 8
    second = controller_of(fakes, num_shards=2)
    second._processes[4].is_joining = True  # as _create_processes marks a worker beyond those configured
    run(second, 3)
    assert fakes["shard-0"].told("serve_only") == []
    fakes["worker-2"].oldest_placement_version = None
    run(second, 1)
    assert [told.placement_version for (told,) in fakes["shard-0"].told("serve_only")] == [9]


def test_a_shard_that_nobody_saw_since_the_controller_was_replaced_is_lost_after_a_while_too() -> None:
    now_s = 0.0
    first, fakes = system(num_shards=3)
    run(first, 4)
    fakes["shard-1"].die()
    drained_under(fakes, 2)
    second = controller_of(fakes, 3, lambda: now_s, Proposer(evenly, expert_bytes=10))
    run(second, 4)
    now_s = 61.0
    run(second, 8)
    expert_map, addresses = fakes["worker-0"].told("update_placement")[-1]
    assert expert_map.ep_ranks == (0, 2)
    assert sorted(addresses) == [0, 2]
    assert second.status().is_serving
    assert second.num_rebalances() == {cause: int(cause is RebalanceCause.LOST) for cause in RebalanceCause}


def test_shards_are_told_to_drop_what_a_dead_controller_staged_once_no_worker_needs_anything_else() -> None:
    first, fakes = system()
    run(first, 4)
    fakes["worker-0"].is_starting = True  # and does not answer: it may know another placement
    second = controller_of(fakes, num_shards=2)
    num_told = len(fakes["shard-0"].told("serve_only"))
    run(second, 3)
    assert len(fakes["shard-0"].told("serve_only")) == num_told
    fakes["worker-0"].is_starting = False
    second = controller_of(fakes, num_shards=2)
    run(second, 4)
    assert len(fakes["shard-0"].told("serve_only")) == num_told + 1


def test_a_shard_that_a_dead_controller_was_draining_leaves_all_the_same() -> None:
    first, fakes = system(num_shards=3, proposer=Proposer(evenly, expert_bytes=10))
    run(first, 4)
    first._balance.membership.drain(1)
    second = controller_of(fakes, 3, proposer=Proposer(evenly, expert_bytes=10))
    drained_under(fakes, 2)
    run(second, 12)
    assert [name for name, _ in second.status().processes if "shard" in name] == ["shard-0", "shard-2"]
    assert not fakes["shard-1"].is_alive
    assert second.status().is_serving


def test_a_worker_that_a_dead_controller_told_to_stop_leaves_or_is_replaced_as_was_meant() -> None:
    first, fakes = system(num_workers=3)
    run(first, 4)
    for worker in ("worker-0", "worker-1"):
        fakes[worker].answers["stop"] = Future()  # it takes time, and the controller dies meanwhile
    first._departures.restart(RoleName.WORKER, 1, is_serving=True)
    first._departures.drain_worker(0)
    run(first, 2)
    assert fakes["worker-0"].told("stop")
    generation = fakes["worker-1"].generation
    for worker in ("worker-0", "worker-1"):
        del fakes[worker].answers["stop"]
    second = controller_of(fakes, num_shards=2)
    run(second, 6)
    assert not fakes["worker-0"].is_alive
    assert fakes["worker-1"].generation != generation
    assert [name for name, _ in second.status().processes if "worker" in name] == ["worker-1", "worker-2"]
    assert second.status().is_serving
