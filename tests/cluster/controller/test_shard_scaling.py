"""The controller changes the number of shards by their load; shards are plain objects that say what they have done."""

import pytest

from cluster.config import ShardScalingConfig
from cluster.controller.balance import Proposer
from cluster.controller.controller import Controller
from cluster.controller.shard_usage import ShardWork
from protos.errors import Unavailable
from tests.cluster.controller.test_membership import drained_under, evenly, names
from tests.cluster.fake_processes import FakeProcess, run, system

CONFIG = ShardScalingConfig(enabled=True, min_count=2, max_count=4, up_window_s=30.0, down_window_s=60.0)


class Loaded:
    """A controller with two shards, and the traffic that they bear."""

    def __init__(self, config: ShardScalingConfig = CONFIG) -> None:
        self.now_s = 0.0
        proposer = Proposer(evenly, expert_bytes=10)
        self.controller: Controller
        self.fakes: dict[str, FakeProcess]
        self.controller, self.fakes = system(2, proposer=proposer, clock=lambda: self.now_s, scaling=config)
        self._done: dict[str, ShardWork] = {}
        self.bear({}, seconds=10.0)
        assert self.controller.status().is_serving

    def bear(self, usage: dict[str, float], seconds: float, queue_s: float = 0.0, default: float = 0.0) -> None:
        """usage: share of the time that each shard computes; its assignments are in proportion."""
        for _ in range(int(seconds)):
            self.now_s += 1.0
            for name in [name for name in self.fakes if name.startswith("shard")]:
                busy = usage.get(name, default)
                done = self._done.get(name, ShardWork(0.0, 0.0, 0, 0))
                self._done[name] = ShardWork(
                    done.compute_s + busy,
                    done.queue_s + 10 * queue_s,
                    done.num_forwards + 10,
                    done.num_assignments + int(1000 * busy),
                )
                self.fakes[name].answers["work"] = self._done[name]
            drained_under(self.fakes, self.controller.status().placement_version)
            run(self.controller, 3)


def test_shards_are_added_when_they_are_busy_and_given_units() -> None:
    system = Loaded()
    system.bear({}, seconds=60.0, default=0.9)
    assert names(system.controller) == ["shard-0", "shard-1", "shard-2"]
    status = system.controller.status()
    assert status.rebalance.num_done == 1
    assert status.rebalance.planned_bytes > 0
    assert len(system.fakes["shard-2"].told("stage")) == 1


def test_the_busiest_shard_counts_not_the_mean() -> None:
    system = Loaded()
    system.bear({"shard-0": 0.95, "shard-1": 0.3}, seconds=60.0)
    assert "shard-2" in names(system.controller)


def test_forwards_that_wait_long_ask_for_a_shard_though_none_is_busy() -> None:
    system = Loaded()
    system.bear({}, seconds=60.0, default=0.5, queue_s=0.05)
    assert "shard-2" in names(system.controller)


def test_idle_shards_leave_down_to_the_least_number_and_give_up_their_units_first() -> None:
    system = Loaded()
    system.bear({}, seconds=120.0, default=0.95)
    assert len(names(system.controller)) == 4
    system.bear({}, seconds=600.0, default=0.05)
    assert names(system.controller) == ["shard-0", "shard-1"]
    assert len(system.fakes["shard-3"].told("stop")) == 1
    assert system.controller.status().is_serving


def test_load_on_target_changes_nothing() -> None:
    system = Loaded()
    system.bear({}, seconds=600.0, default=0.7)
    assert names(system.controller) == ["shard-0", "shard-1"]


def test_nothing_happens_unless_it_is_enabled() -> None:
    system = Loaded(CONFIG.model_copy(update={"enabled": False}))
    system.bear({}, seconds=120.0, default=0.95)
    assert names(system.controller) == ["shard-0", "shard-1"]
    assert system.fakes["shard-0"].told("work") == []


def test_a_shard_that_does_not_answer_stops_no_round_and_is_asked_again() -> None:
    system = Loaded()
    system.bear({}, seconds=20.0, default=0.95)
    system.fakes["shard-1"].answers["work"] = Unavailable("not now")
    for _ in range(30):
        system.now_s += 1.0
        run(system.controller, 1)
    assert names(system.controller) == ["shard-0", "shard-1"]
    system.bear({}, seconds=60.0, default=0.95)
    assert "shard-2" in names(system.controller)


def test_a_restart_of_a_shard_makes_no_load_of_its_counters_going_back(caplog: pytest.LogCaptureFixture) -> None:
    system = Loaded()
    system.bear({}, seconds=20.0, default=0.7)
    system.fakes["shard-1"].die()
    run(system.controller, 1)
    system.fakes["shard-1"].restart()
    system._done.pop("shard-1")
    system.bear({}, seconds=120.0, default=0.7)
    assert names(system.controller) == ["shard-0", "shard-1"]
    assert "round failed" not in caplog.text
