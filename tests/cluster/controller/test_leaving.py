"""Processes whose node is about to end hand over what they do, without Ray and without waiting."""

import pytest

from cluster.controller.balance import Proposer
from cluster.controller.process import ProcessState
from protos.errors import InvalidRequest, Unavailable
from tests.cluster.controller.test_membership import cluster, drained_under, names, now, ranks_in_use
from tests.cluster.fake_processes import run, system

__all__ = ["cluster", "now"]  # fixtures


def test_a_shard_gives_its_units_to_others_and_a_new_one_takes_its_place(cluster) -> None:
    controller, fakes = cluster
    fakes["shard-1"].must_leave = True
    for version in (2, 3, 4):
        run(controller, 6)
        drained_under(fakes, version)
    run(controller, 10)
    assert names(controller) == ["shard-0", "shard-2", "shard-3"]
    assert ranks_in_use(fakes)[1] == [0, 2, 3]
    assert len(fakes["shard-1"].told("stop")) == 1
    assert controller.status().is_serving


def test_a_shard_whose_units_nobody_can_take_ends_with_them_and_comes_back() -> None:
    def refuse(load, current, version, shards):
        raise InvalidRequest("no room")

    controller, fakes = system(proposer=Proposer(refuse, expert_bytes=1))
    run(controller, 4)
    generation = fakes["shard-1"].generation
    fakes["shard-1"].must_leave = True
    run(controller, 6)
    assert fakes["shard-1"].generation != generation
    assert names(controller) == ["shard-0", "shard-1"]
    assert controller.status().is_serving


def test_a_shard_whose_place_no_other_one_can_take_keeps_its_units(cluster) -> None:
    controller, _ = cluster
    membership = controller._balance.membership

    def refuse(rank):
        raise Unavailable("still ending", retry_after_s=1.0)

    membership._create = refuse
    with pytest.raises(Unavailable):
        membership.replace(1)
    assert [shard.rank for shard in membership.staying] == [0, 1, 2]


def test_a_worker_leaves_the_gateways_first_and_what_starts_on_its_node_meanwhile_loads_nothing() -> None:
    controller, fakes = system()
    run(controller, 4)
    fakes["worker-0"].must_leave = True
    run(controller, 1)
    assert set(fakes["gateway-0"].told("update_members")[-1][0]) == {1}
    restart = fakes["worker-0"].restart

    def restart_here() -> None:
        restart()
        fakes["worker-0"].must_leave = True

    fakes["worker-0"].restart = restart_here  # type: ignore[method-assign]
    num_loads = len(fakes["worker-0"].told("load"))
    run(controller, 10)
    assert fakes["worker-0"].state is ProcessState.NEW
    assert len(fakes["worker-0"].told("load")) == num_loads
    restart()  # on another node
    run(controller, 6)
    assert set(fakes["gateway-0"].told("update_members")[-1][0]) == {0, 1}
    assert controller.status().is_serving
