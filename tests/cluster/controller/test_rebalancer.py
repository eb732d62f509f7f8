"""Rebalances of a controller whose processes are plain objects: every step, and every death in between."""

import re
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest

from cluster.config import RebalancingConfig
from cluster.controller.balance import Proposer
from cluster.controller.controller import Controller
from cluster.controller.process import RoleName
from cluster.controller.rebalance import Hysteresis, RebalanceCause, RebalancePlan, RebalanceState, plan_rebalance
from cluster.controller.unit_sources import NO_SOURCES, UnitSources
from protos.errors import InternalError, RebalanceRefused
from router.expert_map import ExpertMap
from router.placement import PlacementError
from router.placement.members import ShardTraits
from tests.cluster.fake_processes import FakeProcess, answered, counted, run, system
from tests.fake_experts import grouped_gate, placed


def swapped(load: np.ndarray, current: ExpertMap, placement_version: int, shards: object) -> ExpertMap:
    """Every unit on the other one of two shards."""
    return replace(current, placement_version=placement_version, unit_to_ep_ranks=1 - current.unit_to_ep_ranks)


PROPOSER = Proposer(place=swapped, expert_bytes=10)


def serving(**options: object) -> tuple[Controller, dict[str, FakeProcess]]:
    controller, fakes = system(**{"proposer": PROPOSER, **options})
    for name, fake in fakes.items():
        if name.startswith("worker"):
            fake.answers["oldest_placement_version"] = 2
    run(controller, 4)
    assert controller.status().is_serving
    return controller, fakes


def asked(controller: Controller, *, start: bool = True) -> RebalancePlan:
    """What an operator's thread is answered after a round."""
    return answered(controller, controller.rebalance if start else controller.plan_rebalance)


def state(controller: Controller) -> RebalanceState:
    return controller.status().rebalance.state


def run_until(controller: Controller, wanted: RebalanceState) -> None:
    for _ in range(20):
        if state(controller) is wanted:
            return
        controller.reconcile()
    raise AssertionError(f"{controller.status().rebalance}")


def test_shards_stage_and_activate_before_workers_are_told_and_release_after_they_have_drained() -> None:
    controller, fakes = serving()
    order: list[str] = []
    for name, fake in fakes.items():
        fake.on_call = lambda method, name=name: order.append(f"{name} {method}")
    plan = asked(controller)
    run(controller, 10)
    status = controller.status()
    assert status.placement_version == plan.new.placement_version == 2
    assert status.rebalance.state is RebalanceState.IDLE
    assert (status.rebalance.num_done, status.rebalance.num_aborted) == (1, 0)
    assert status.rebalance.reason == "asked for"
    assert controller.num_rebalances()[RebalanceCause.BY_HAND] == 1
    assert re.fullmatch(r"version 2 is served: 24 units moved in \d+\.\d s", status.rebalance.last_result)
    assert status.rebalance.moved_bytes == status.rebalance.planned_bytes == plan.moved_bytes == 24 * 2 * 10
    steps = [step for step in order if not step.endswith(("health", "load_counts", "update_members"))]
    assert steps == [
        "shard-0 stage", "shard-1 stage", "shard-0 activate", "shard-1 activate", "worker-0 update_placement",
        "worker-1 update_placement", "worker-0 oldest_placement_version", "worker-1 oldest_placement_version",
        "shard-0 release", "shard-1 release", "shard-0 serve_only", "shard-1 serve_only",
    ]  # fmt: skip
    assert fakes["shard-0"].told("release") == [(1,)]
    ((version, units),) = fakes["shard-1"].told("activate")
    assert (version, units) == (2, plan.new.units_of(1))
    expert_map, _ = fakes["worker-0"].told("update_placement")[-1]
    assert expert_map.placement_version == 2


def test_a_plan_is_only_a_plan() -> None:
    controller, fakes = serving()
    plan = asked(controller, start=False)
    run(controller, 5)
    assert plan.moved_bytes == 24 * 2 * 10
    assert controller.status().placement_version == 1
    assert fakes["shard-0"].told("stage") == []


def test_nothing_is_released_while_a_worker_has_forwards_under_the_old_version() -> None:
    controller, fakes = serving()
    fakes["worker-1"].answers["oldest_placement_version"] = 1
    asked(controller)
    run(controller, 10)
    assert state(controller) is RebalanceState.DRAINING
    assert fakes["shard-0"].told("release") == []
    fakes["worker-1"].answers["oldest_placement_version"] = 2
    run(controller, 3)
    assert fakes["shard-0"].told("release") == [(1,)]


def test_a_worker_that_cannot_say_what_it_needs_is_asked_again() -> None:
    controller, fakes = serving()
    fakes["worker-1"].answers["oldest_placement_version"] = RuntimeError("the answer could not be read")
    asked(controller)
    run(controller, 10)
    assert state(controller) is RebalanceState.DRAINING
    fakes["worker-1"].answers["oldest_placement_version"] = 2
    run(controller, 4)
    assert state(controller) is RebalanceState.IDLE
    assert fakes["shard-0"].told("release") == [(1,)]


@pytest.mark.parametrize("at", [RebalanceState.STAGING, RebalanceState.ACTIVATING])
@pytest.mark.parametrize("comes_back", [False, True])
def test_a_shard_that_dies_before_workers_are_told_ends_it_and_the_old_version_goes_on(at, comes_back) -> None:
    controller, fakes = serving()
    never: Future[None] = Future()
    fakes["shard-0"].answers["stage" if at is RebalanceState.STAGING else "activate"] = never
    asked(controller)
    run_until(controller, at)
    fakes["shard-1"].die()
    if comes_back:  # between two rounds, as another generation
        fakes["shard-1"].restart()
    run(controller, 2)
    status = controller.status()
    assert status.rebalance.num_aborted == 1
    assert "shard-1 was lost" in status.rebalance.last_result
    assert status.placement_version == 1
    assert fakes["shard-0"].told("release") == [(2,)]
    fakes["shard-1"].restart()
    del fakes["shard-0"].answers["stage" if at is RebalanceState.STAGING else "activate"]
    run(controller, 4)
    loaded = fakes["shard-1"].told("load")[-1][0]
    assert loaded.placement_version == 1
    assert controller.status().is_serving
    for worker in ("worker-0", "worker-1"):
        fakes[worker].answers["oldest_placement_version"] = 3
    assert asked(controller).new.placement_version == 3  # a version is used once
    run(controller, 10)
    assert controller.status().placement_version == 3


def test_a_shard_that_cannot_read_its_units_ends_it() -> None:
    controller, fakes = serving()
    fakes["shard-1"].answers["stage"] = OSError("no space left on device")
    asked(controller)
    run(controller, 6)
    rebalance = controller.status().rebalance
    assert rebalance.num_aborted == 1
    assert len(fakes["shard-1"].told("stage")) == 3
    assert "shard-1 could not take its units: no space left on device" in rebalance.last_result


def test_a_shard_that_could_not_read_its_units_once_is_asked_for_the_same_ones_again() -> None:
    controller, fakes = serving()
    fakes["shard-1"].answers["stage"] = OSError("the disk was away")
    # Once, however many rounds the controller goes until it answers.
    fakes["shard-1"].on_call = lambda method: (
        len(fakes["shard-1"].told("stage")) > 1 and fakes["shard-1"].answers.pop("stage", None)
    )
    asked(controller)
    run(controller, 10)
    first, second = fakes["shard-1"].told("stage")
    assert first == second
    assert controller.status().rebalance.num_done == 1
    result = controller.status().rebalance.last_result
    asked(controller)
    assert "version 2 is served" in result
    assert controller.status().rebalance.last_result == result  # until the next one has ended


def test_units_are_copied_from_the_least_busy_shard_that_has_them_and_read_where_none_has() -> None:
    controller, _ = system(num_shards=4)
    run(controller, 4)
    old = placed(grouped_gate(), 4, num_replicas=2)
    new = placed(grouped_gate(), 4, num_replicas=3, placement_version=2)
    load = np.ones((3, 16))
    plan = plan_rebalance(old, new, load, 10, Hysteresis(0.0, 0))
    sources = UnitSources(plan)
    processes = [process for process in controller._processes if process.role is RoleName.SHARD]
    given: dict[str, int] = {}
    for move in plan.moves:
        unit = next(unit for unit in new.units_of(move.ep_rank) if unit[:2] == (move.layer_id, move.unit_id))
        (address,) = sources.addresses([unit], processes[move.ep_rank], processes)
        holders = {f"shard-{rank}.0:1" for rank in old.ep_ranks if unit in old.units_of(rank)}
        assert address in holders
        given[address] = given.get(address, 0) + 1
    assert max(given.values()) < 1.5 * sum(given.values()) / 4
    assert NO_SOURCES.addresses([unit], processes[0], processes) == ("",)


def test_a_shard_that_dies_after_workers_were_told_loads_the_new_version_and_the_rebalance_is_done() -> None:
    controller, fakes = serving()
    fakes["worker-1"].answers["oldest_placement_version"] = 1
    asked(controller)
    run_until(controller, RebalanceState.DRAINING)
    fakes["shard-1"].die()
    run(controller, 1)
    fakes["shard-1"].restart()
    fakes["worker-1"].answers["oldest_placement_version"] = 2
    run(controller, 5)
    assert fakes["shard-1"].told("load")[-1][0].placement_version == 2
    status = controller.status()
    assert (status.rebalance.num_done, status.is_serving, status.placement_version) == (1, True, 2)


def test_a_worker_that_dies_while_it_drains_is_not_waited_for() -> None:
    controller, fakes = serving()
    fakes["worker-1"].answers["oldest_placement_version"] = 1
    asked(controller)
    run_until(controller, RebalanceState.DRAINING)
    fakes["worker-1"].die()
    run(controller, 4)
    assert controller.status().rebalance.num_done == 1


def test_one_at_a_time_only_while_everything_serves_and_only_where_both_placements_fit() -> None:
    controller, fakes = serving()
    fakes["shard-0"].answers["stage"] = Future()
    asked(controller)
    with pytest.raises(RebalanceRefused, match="version 2 is staging"):
        asked(controller)
    controller, fakes = serving()
    fakes["shard-0"].die()
    run(controller, 1)
    with pytest.raises(RebalanceRefused, match="not every process is ready"):
        asked(controller)
    controller, fakes = serving(proposer=PROPOSER._replace(traits=lambda ep_rank: ShardTraits(max_weight_bytes=300)))
    with pytest.raises(RebalanceRefused, match=r"would hold 480 bytes .* limit is 300"):
        asked(controller)


def test_a_placement_that_cannot_be_computed_is_refused_with_its_reason() -> None:
    def place(load: np.ndarray, current: ExpertMap, placement_version: int, shards: object) -> ExpertMap:
        raise PlacementError("too few shards")

    controller, _ = serving(proposer=Proposer(place, expert_bytes=10))
    with pytest.raises(RebalanceRefused, match="no placement can be computed: too few shards"):
        asked(controller)


def test_a_fault_of_a_policy_is_told_to_the_operator_and_the_rounds_go_on() -> None:
    def place(load: np.ndarray, current: ExpertMap, placement_version: int, shards: object) -> ExpertMap:
        raise ZeroDivisionError("division by zero")

    controller, _ = serving(proposer=Proposer(place, expert_bytes=10))
    with pytest.raises(InternalError, match="what was asked failed: division by zero"):
        asked(controller)
    assert controller.status().is_serving


def test_by_itself_only_when_enabled_due_and_worth_it() -> None:
    now = [0.0]
    options = {"enabled": True, "min_interval_s": 60.0, "min_assignments": 100, "min_gain": 0.05}

    def one_hot_pair(load: np.ndarray, current: ExpertMap, placement_version: int, shards: object) -> ExpertMap:
        """Brings the two units that the fakes' counters are of apart."""
        assert load[0, 0] > 0
        ranks = current.unit_to_ep_ranks.copy()
        ranks[0, 2] = 1 - ranks[0, 0]
        return replace(current, placement_version=placement_version, unit_to_ep_ranks=ranks)

    controller, fakes = serving(
        clock=lambda: now[0], proposer=Proposer(one_hot_pair, 10), rebalancing=RebalancingConfig(**options)
    )
    counts = np.zeros((3, 16), dtype=np.uint64)
    counts[0, [0, 4]] = 1000
    now[0] = 25.0
    run(controller, 2)
    for shard in ("shard-0", "shard-1"):
        fakes[shard].answers["load_counts"] = counted(counts)
    now[0] = 30.0
    run(controller, 5)
    assert controller.status().placement_version == 1  # not due yet
    now[0] = 61.0
    run(controller, 10)
    assert controller.status().placement_version == 2
    run(controller, 10)
    now[0] = 130.0
    run(controller, 10)
    assert controller.status().placement_version == 2  # nothing to gain any more
