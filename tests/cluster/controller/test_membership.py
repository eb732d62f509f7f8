"""Shards are added and drained by a controller whose processes are plain objects."""

from concurrent.futures import Future
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from cluster.controller.balance import Proposer
from cluster.controller.controller import Controller
from cluster.controller.process import ProcessState, RoleName
from cluster.controller.rebalance import RebalanceCause
from cluster.controller.rebalancer import URGENT_BYTES_PER_S
from protos.errors import InvalidRequest, RebalanceRefused
from router.expert_map import ExpertMap
from router.placement import PlacementDoesNotFit, PlacementRequest
from router.placement.members import ShardTraits, place_on
from tests.cluster.fake_processes import FakeProcess, answered, run, system
from tests.fake_experts import grouped_gate
from tests.router.placement.requests import v2_request

SHARDS = ["shard-0", "shard-1", "shard-2"]


def evenly(
    load: np.ndarray, current: ExpertMap, placement_version: int, shards: dict, num_replicas: int = 1
) -> ExpertMap:
    request = PlacementRequest(
        moe_layer_ids=current.moe_layer_ids,
        gate=grouped_gate(),
        ep_size=num_replicas,
        num_replicas=num_replicas,
        load=load,
        current=current,
    )
    return place_on(request, shards, placement_version, "device_limited")


@pytest.fixture
def now() -> list[float]:
    return [0.0]


@pytest.fixture
def cluster(now: list[float]) -> tuple[Controller, dict[str, FakeProcess]]:
    controller, fakes = system(num_shards=3, proposer=Proposer(evenly, expert_bytes=10), clock=lambda: now[0])
    run(controller, 4)
    drained_under(fakes, 2)
    assert controller.status().is_serving
    return controller, fakes


def drained_under(fakes: dict[str, FakeProcess], version: int) -> None:
    """Workers have no forward under way of an older version."""
    for name in ("worker-0", "worker-1"):
        fakes[name].answers["oldest_placement_version"] = version


def names(controller: Controller) -> list[str]:
    return [name for name, _ in controller.status().processes if name.startswith("shard")]


def ranks_in_use(fakes: dict[str, FakeProcess]) -> tuple[tuple[int, ...], list[int]]:
    """By the map and by the addresses that workers were told last."""
    expert_map, addresses = fakes["worker-0"].told("update_placement")[-1]
    return expert_map.ep_ranks, sorted(addresses)


def test_a_shard_that_is_added_starts_and_is_given_units(cluster) -> None:
    controller, fakes = cluster
    change = answered(controller, lambda: controller.scale_shards(4))
    assert (change.added, change.drained) == ((3,), ())
    run(controller, 12)
    assert names(controller) == [*SHARDS, "shard-3"]
    assert ranks_in_use(fakes) == ((0, 1, 2, 3), [0, 1, 2, 3])
    (first,) = fakes["shard-3"].told("load")
    assert first[0].units_of(3) == ()
    assert fakes["shard-3"].told("stage")
    assert controller.status().is_serving
    assert controller.status().rebalance.reason == "shard 3 came"
    assert controller.num_rebalances()[RebalanceCause.ADDED] == 1


def test_a_shard_that_is_drained_ends_when_the_others_have_its_units_and_they_keep_their_ranks(cluster) -> None:
    controller, fakes = cluster
    drained_under(fakes, 1)
    change = answered(controller, lambda: controller.drain_shard(1))
    assert (change.added, change.drained) == ((), (1,))
    run(controller, 12)
    assert names(controller) == SHARDS  # forwards to it are under way
    assert "is drained" in dict(controller.status().processes)["shard-1"].detail
    assert controller.status().rebalance.reason == "shard 1 leaves"
    assert controller.num_rebalances()[RebalanceCause.DRAINED] == 1
    assert fakes["shard-1"].told("stop") == []
    drained_under(fakes, 2)
    run(controller, 6)
    assert names(controller) == ["shard-0", "shard-2"]
    assert not fakes["shard-1"].is_alive
    assert ranks_in_use(fakes) == ((0, 2), [0, 2])
    assert controller.status().is_serving
    drained_under(fakes, 3)
    answered(controller, lambda: controller.scale_shards(3))
    run(controller, 12)
    assert ranks_in_use(fakes) == ((0, 1, 2), [0, 1, 2])  # the free number is taken again


def test_experts_do_not_begin_to_move_while_a_shard_is_being_replaced(cluster) -> None:
    controller, fakes = cluster
    drained_under(fakes, 1)
    generation = fakes["shard-0"].generation
    controller._restart(RoleName.SHARD, 0)
    controller._balance.membership.drain(1)
    with pytest.raises(RebalanceRefused, match="not every process is ready"):
        controller._begin_rebalance()
    while fakes["shard-0"].generation == generation:
        run(controller, 1)
        assert not any(controller.num_rebalances().values())
    run(controller, 20)
    assert controller.num_rebalances()[RebalanceCause.DRAINED] == 1


def test_the_last_shard_is_not_drained_and_the_message_says_why(cluster) -> None:
    controller, _ = cluster
    answered(controller, lambda: controller.scale_shards(1))
    with pytest.raises(InvalidRequest, match="shard 0 is the last one that stays, and no other could take its units"):
        answered(controller, lambda: controller.drain_shard(0))


def test_a_drained_shard_that_does_not_stop_is_killed_when_its_time_is_over(cluster, now) -> None:
    controller, fakes = cluster
    fakes["shard-1"].answers["stop"] = Future()
    answered(controller, lambda: controller.drain_shard(1))
    run(controller, 14)
    assert names(controller) == SHARDS
    now[0] += 36.0
    run(controller, 2)
    assert names(controller) == ["shard-0", "shard-2"]
    assert not fakes["shard-1"].is_alive


def test_a_shard_that_is_lost_for_good_is_drained_without_it(cluster) -> None:
    controller, fakes = cluster
    fakes["shard-1"].die()
    run(controller, 2)
    assert not controller.status().is_serving
    answered(controller, lambda: controller.drain_shard(1))
    run(controller, 14)
    assert names(controller) == ["shard-0", "shard-2"]
    assert controller.status().is_serving


def test_fewer_shards_means_the_last_ones_leave_and_only_if_the_rest_can_hold_the_model(cluster) -> None:
    controller, fakes = cluster
    change = answered(controller, lambda: controller.scale_shards(2))
    assert change.drained == (2,)
    run(controller, 14)
    assert names(controller) == SHARDS[:2]
    with pytest.raises(InvalidRequest, match="at least 1 shard"):
        answered(controller, lambda: controller.scale_shards(0))
    with pytest.raises(RebalanceRefused, match="use at most 24 shards"):
        answered(controller, lambda: controller.scale_shards(1_000))
    with pytest.raises(InvalidRequest, match="count is 4294967295, limit is 4096 shards"):
        answered(controller, lambda: controller.scale_shards(2**32 - 1))
    with pytest.raises(InvalidRequest, match=r"no shard 7, only \[0, 1\]"):
        answered(controller, lambda: controller.drain_shard(7))
    assert set(fakes) >= {"shard-0", "shard-1", "shard-2"}
    assert names(controller) == SHARDS[:2]


def test_a_new_shard_that_cannot_start_holds_nothing_up_and_is_used_once_it_can(cluster) -> None:
    controller, fakes = cluster
    answered(controller, lambda: controller.scale_shards(4))
    fakes["shard-3"].is_starting = True  # Ray has no room for it
    fakes["shard-3"].state = ProcessState.NEW
    run(controller, 3)
    assert controller.status().is_serving
    answered(controller, lambda: controller.drain_shard(0))
    run(controller, 14)
    assert names(controller) == ["shard-1", "shard-2", "shard-3"]
    drained_under(fakes, 3)


def test_a_rebalance_for_a_new_shard_that_dies_meanwhile_is_tried_again(cluster, now) -> None:
    controller, fakes = cluster
    answered(controller, lambda: controller.scale_shards(4))
    run(controller, 1)
    fakes["shard-3"].die()
    run(controller, 3)
    fakes["shard-3"].restart()
    drained_under(fakes, 9)
    for _ in range(30):
        now[0] += 1.0
        controller.reconcile()
    assert ranks_in_use(fakes)[0] == (0, 1, 2, 3)


def test_shards_that_differ_are_used_in_proportion() -> None:
    request = replace(v2_request(3), expert_bytes=1)
    held = 59 * 160
    shards = {
        0: ShardTraits(speed=1.0, max_weight_bytes=held),
        2: ShardTraits(speed=2.0, max_weight_bytes=held),
        5: ShardTraits(speed=4.0, max_weight_bytes=held // 4),
    }
    expert_map = place_on(request, shards, 1, "device_limited")
    assert expert_map.ep_ranks == (0, 2, 5)
    sizes = [sum(len(unit.expert_ids) for unit in expert_map.units_of(rank)) for rank in (0, 2, 5)]
    assert sizes[2] <= held // 4
    assert sizes[1] / sizes[0] == pytest.approx(2.0, rel=0.1)


def test_with_two_replicas_every_unit_survives_the_loss_of_any_one_node_from_the_start_on() -> None:
    proposer = Proposer(partial(evenly, num_replicas=2), expert_bytes=10, needs_domains=True)
    controller, fakes = system(num_shards=6, proposer=proposer)
    shards = [fakes[f"shard-{rank}"] for rank in range(6)]
    for rank, shard in enumerate(shards):
        shard.domain = f"node-{rank // 2}"
    shards[5].die()
    run(controller, 3)
    assert shards[0].told("load") == []  # where the others are is not known yet
    shards[5].restart()
    run(controller, 6)
    assert controller.status().is_serving
    (expert_map,) = shards[0].told("load")[0]
    first = expert_map.unit_to_ep_ranks[:, :, 0] // 2
    other = expert_map.unit_to_ep_ranks[:, :, 1] // 2
    assert (first != other).all()
    drained_under(fakes, 9)
    answered(controller, lambda: controller.drain_shard(3))
    run(controller, 14)
    after, _ = fakes["worker-0"].told("update_placement")[-1]
    assert after.ep_ranks == (0, 1, 2, 4, 5)
    units = after.unit_to_ep_ranks.reshape(-1, after.max_replicas)
    assert all(len({rank // 2 for rank in ranks if rank >= 0}) > 1 for ranks in units)


def test_nodes_that_do_not_allow_it_are_named_and_the_system_starts(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(*_: object) -> ExpertMap:
        raise PlacementDoesNotFit("use more even domains")

    controller, fakes = system(proposer=Proposer(refuse, expert_bytes=10, needs_domains=True))
    fakes["shard-1"].domain = "node-1"
    run(controller, 5)
    assert controller.status().is_serving
    assert "use more even domains" in caplog.text


def test_units_of_a_shard_that_stays_away_are_given_to_the_others_and_it_gets_units_when_it_is_back(
    cluster, now
) -> None:
    controller, fakes = cluster
    fakes["shard-1"].die()
    now[0] += 50.0
    run(controller, 8)
    assert ranks_in_use(fakes) == ((0, 1, 2), [0, 1, 2])  # it may come back
    now[0] += 20.0
    run(controller, 8)
    assert ranks_in_use(fakes) == ((0, 2), [0, 2])
    assert controller.status().is_serving
    assert fakes["shard-0"].told("stage")[0][1] == URGENT_BYTES_PER_S
    drained_under(fakes, 3)
    fakes["shard-1"].restart()
    run(controller, 12)
    assert ranks_in_use(fakes) == ((0, 1, 2), [0, 1, 2])
    assert fakes["shard-1"].told("load")[-1][0].units_of(1) == ()
    assert fakes["shard-1"].told("stage")[0][1] < URGENT_BYTES_PER_S


def test_when_all_shards_stay_away_the_rest_is_looked_after_until_they_are_back(cluster, now) -> None:
    controller, fakes = cluster
    for name in SHARDS:
        fakes[name].die()
    for _ in range(3):
        now[0] += 61.0
        controller.reconcile()
    fakes["worker-0"].die()
    run(controller, 1)
    assert set(fakes["gateway-0"].told("update_members")[-1][0]) == {1}
    fakes["worker-0"].restart()
    for name in SHARDS:
        fakes[name].restart()
    run(controller, 6)
    assert controller.status().is_serving


def test_a_shard_that_loads_is_waited_for_however_long_it_takes(cluster, now) -> None:
    controller, fakes = cluster
    fakes["shard-1"].restart()
    fakes["shard-1"].on_call = lambda method: None
    fakes["shard-1"].answers["load"] = None
    fakes["shard-1"].state = ProcessState.LOADING
    now[0] += 500.0
    run(controller, 8)
    assert ranks_in_use(fakes) == ((0, 1, 2), [0, 1, 2])


def test_a_shard_with_the_number_of_one_that_was_drained_while_it_was_replaced_is_replaced_in_its_turn(cluster) -> None:
    controller, fakes = cluster
    first, restart = fakes["shard-2"], partial(controller._departures.restart, RoleName.SHARD, 2, is_serving=True)
    restart()
    first.restart = first.die  # type: ignore[method-assign]
    run(controller, 4)
    controller._balance.membership.drain(2)
    FakeProcess.restart(first)
    run(controller, 20)
    drained_under(fakes, 2)
    run(controller, 20)
    assert names(controller) == SHARDS[:2]
    controller._balance.membership.scale(3)
    run(controller, 8)
    drained_under(fakes, 3)
    run(controller, 8)
    generation = fakes["shard-2"].generation
    restart()
    run(controller, 8)
    assert fakes["shard-2"].generation != generation
