"""What an operator reads of one status after another."""

from dataclasses import replace
from typing import Any

import pytest

from cluster.controller.process import DRAINS, RESTARTS, ClusterStatus, ProcessState, Quarantine
from cluster.controller.rebalance import RebalanceState, RebalanceStatus
from cluster.controller.status_events import StatusEvents
from tests.fake_controller import life, rebalance_plan, serving_status


def told(*statuses: ClusterStatus) -> list[tuple[str, str, str]]:
    """Of one status a second, without what the first one tells."""
    now = [0.0]
    events, lines = StatusEvents(lambda: now[0]), []
    for status in statuses:
        lines.append([(str(event.level), event.subject, event.text) for event in events.observe(status)])
        now[0] += 1.0
    return [line for some in lines[1:] for line in some]


def with_health(status: ClusterStatus, name: str, **changes: Any) -> ClusterStatus:
    processes = tuple(
        (other, replace(health, **changes) if other == name else health) for other, health in status.processes
    )
    is_serving = all(health.state is ProcessState.READY for _, health in processes)
    return replace(status, processes=processes, is_serving=is_serving)


WELL = serving_status()
DOWN = with_health(WELL, "shard-1", state=ProcessState.DOWN, detail="does not answer", generation="", pid=0)


def test_a_rebalance_is_told_from_its_beginning_and_reason_to_its_end() -> None:
    statuses = life(rebalance_plan())
    asked = [replace(status, rebalance=replace(status.rebalance, reason="asked for")) for status in statuses]
    assert told(*asked) == [
        ("info", "rebalance", "to version 2 began (asked for): 5.0 MiB to read"),
        ("info", "placement", "workers are told version 2"),
        ("good", "rebalance", "version 2 is served: 3 units moved"),
    ]


def test_a_rebalance_that_was_given_up_says_why() -> None:
    lines = told(*life(rebalance_plan(), aborted_while=RebalanceState.STAGING))
    assert lines[-1] == ("bad", "rebalance", "version 2 was given up while staging: shard-1 was lost")


def test_one_that_came_and_went_between_two_looks_is_told_all_the_same() -> None:
    done = serving_status(2, RebalanceStatus(num_done=1, last_result="version 2 is served"))
    assert ("good", "rebalance", "version 2 is served") in told(WELL, done)


def test_a_rebalance_that_the_next_one_follows_between_two_looks_is_told_to_its_end() -> None:
    drained = RebalanceStatus(
        state=RebalanceState.STAGING, target_version=4, num_done=1, last_result="version 3 is served", reason="drain"
    )
    grown = RebalanceStatus(state=RebalanceState.STAGING, target_version=3, reason="shard 4 came")
    assert told(serving_status(2), serving_status(2, grown), serving_status(3, drained)) == [
        ("info", "rebalance", "to version 3 began (shard 4 came): 0 B to read"),
        ("info", "placement", "workers are told version 3"),
        ("good", "rebalance", "version 3 is served"),
        ("info", "rebalance", "to version 4 began (drain): 0 B to read"),
    ]


def test_a_rebalance_whose_controller_was_lost_is_told_to_have_ended() -> None:
    under_way = RebalanceStatus(state=RebalanceState.STAGING, target_version=3, num_done=1)
    assert told(serving_status(2, under_way), serving_status(2)) == [
        ("bad", "rebalance", "to version 3 ended with its controller; version 2 goes on")
    ]


def test_a_process_that_was_silent_and_is_the_same_is_told_with_the_time_it_took() -> None:
    assert told(WELL, DOWN, DOWN, WELL) == [
        ("bad", "shard-1", "is down: does not answer"),
        ("bad", "system", "not every process is ready"),
        ("good", "shard-1", "is ready after 2.0 s"),
        ("good", "system", "serves after 2.0 s"),
    ]


def test_a_process_that_died_is_ready_again_as_another_one() -> None:
    another = with_health(WELL, "shard-1", generation="new", pid=77)
    loading = with_health(another, "shard-1", state=ProcessState.LOADING)
    assert told(WELL, DOWN, loading, another)[2] == (
        "good",
        "shard-1",
        "is ready after 2.0 s, as another process, pid 77",
    )


def test_a_process_that_was_replaced_between_two_looks_is_told() -> None:
    another = with_health(WELL, "worker-0", generation="new", pid=77)
    assert told(WELL, another) == [("bad", "worker-0", "was replaced by another process, pid 77")]


def test_a_process_that_cannot_load_says_why() -> None:
    failed = with_health(WELL, "shard-1", state=ProcessState.FAILED, detail="OSError: no such file")
    assert told(WELL, failed)[0] == ("bad", "shard-1", "is failed: OSError: no such file")


def test_processes_that_join_and_leave_are_named() -> None:
    first, last = replace(WELL, processes=WELL.processes[1:]), replace(WELL, processes=WELL.processes[:-1])
    assert set(told(first, last)) == {("info", "shard-0", "joins, is ready"), ("info", "gateway-0", "has left")}


def test_a_drain_is_told_from_its_beginning_to_its_end() -> None:
    draining = with_health(WELL, "shard-1", detail="is drained: its units move to the other shards")
    gone = replace(WELL, processes=tuple(p for p in WELL.processes if p[0] != "shard-1"))
    assert told(WELL, draining, draining, gone) == [
        ("info", "shard-1", "is drained: its units move to the other shards"),
        ("info", "shard-1", "has left after 2.0 s"),
    ]


def replaced(name: str) -> list[ClusterStatus]:
    """A planned restart as a look a second shows it."""
    ending = with_health(WELL, name, detail=RESTARTS)
    away = with_health(WELL, name, state=ProcessState.DOWN, detail=RESTARTS, generation="", pid=0)
    another = with_health(WELL, name, generation="new", pid=77)
    return [WELL, ending, away, with_health(another, name, state=ProcessState.LOADING), another]


def test_a_planned_restart_is_no_bad_news() -> None:
    assert told(*replaced("shard-0")) == [
        ("info", "shard-0", "ends, and is started again"),
        ("info", "system", "not every process is ready, as planned: shard-0"),
        ("good", "shard-0", "is ready after 2.0 s, as another process, pid 77"),
        ("good", "system", "serves after 2.0 s"),
    ]


def test_a_planned_restart_while_another_process_joins_is_no_bad_news() -> None:
    _, ending, away, *_ = replaced("shard-0")
    (_, health), *_ = WELL.processes
    joining = ("shard-9", replace(health, state=ProcessState.STARTING, generation=""))
    lines = told(WELL, ending, replace(away, processes=(*away.processes, joining)))
    assert lines[-1] == ("info", "system", "not every process is ready, as planned: shard-0, shard-9")
    assert "bad" not in {level for level, *_ in lines}


def test_a_planned_restart_that_is_first_seen_while_the_process_is_away_is_told_as_one() -> None:
    first, _, away, *_ = replaced("shard-0")
    assert told(first, away) == [
        ("info", "shard-0", "ends, and is started again"),
        ("info", "system", "not every process is ready, as planned: shard-0"),
    ]


def test_a_planned_restart_that_is_first_seen_while_the_next_process_loads_is_told_as_one() -> None:
    another = with_health(WELL, "shard-0", generation="new", pid=77, replaced_generation="shard-0.0")
    loading = with_health(another, "shard-0", state=ProcessState.LOADING, detail="reading weights")
    assert told(WELL, loading, another) == [
        ("info", "shard-0", "ends, and is started again"),
        ("info", "system", "not every process is ready, as planned: shard-0"),
        ("good", "shard-0", "is ready after 1.0 s, as another process, pid 77"),
        ("good", "system", "serves after 1.0 s"),
    ]


def test_a_planned_restart_between_two_looks_is_no_bad_news() -> None:
    another = with_health(WELL, "shard-0", generation="new", pid=77, replaced_generation="shard-0.0")
    assert told(WELL, another) == [("info", "shard-0", "was replaced by another process, pid 77")]


def test_a_process_that_is_lost_after_a_planned_restart_is_bad_news() -> None:
    another = with_health(WELL, "shard-0", generation="new", pid=77, replaced_generation="shard-0.0")
    third = with_health(another, "shard-0", generation="newest", pid=78)
    assert told(WELL, another, third)[1:] == [("bad", "shard-0", "was replaced by another process, pid 78")]
    loading = with_health(third, "shard-0", state=ProcessState.LOADING)
    assert told(WELL, another, loading)[1] == ("bad", "shard-0", "is loading")


@pytest.mark.parametrize("state", [ProcessState.DOWN, ProcessState.FAILED])
def test_the_next_process_of_a_planned_restart_that_cannot_load_is_bad_news(state: ProcessState) -> None:
    *before, loading, _ = replaced("shard-0")
    lost = with_health(loading, "shard-0", state=state, detail="why")
    assert told(*before, loading, lost)[-1] == ("bad", "shard-0", f"is {state}: why")


def test_a_process_that_was_told_to_end_and_goes_on_is_missed_when_it_is_lost() -> None:
    ending = with_health(WELL, "shard-1", detail=RESTARTS)  # by a controller that was lost before it came to that
    assert told(WELL, ending, WELL, DOWN)[1:] == [
        ("bad", "shard-1", "is down: does not answer"),
        ("bad", "system", "not every process is ready"),
    ]


def test_another_process_that_is_lost_during_a_planned_restart_is_bad_news() -> None:
    both = with_health(replaced("shard-0")[2], "worker-0", state=ProcessState.DOWN, detail="does not answer")
    assert told(WELL, both)[1:] == [
        ("bad", "worker-0", "is down: does not answer"),
        ("bad", "system", "not every process is ready"),
    ]


def test_a_process_is_timed_by_itself_and_not_by_the_one_that_had_its_name() -> None:
    down = with_health(WELL, "shard-1", detail=f"{DRAINS}units move", state=ProcessState.DOWN, generation="", pid=0)
    gone = replace(WELL, processes=tuple(p for p in WELL.processes if p[0] != "shard-1"))
    starting = with_health(WELL, "shard-1", state=ProcessState.STARTING, generation="")
    lines = told(WELL, down, gone, gone, gone, starting, with_health(WELL, "shard-1", generation="new", pid=77))
    assert ("info", "shard-1", "has left after 1.0 s") in lines
    assert ("good", "shard-1", "is ready after 1.0 s") in lines


def test_a_drain_after_a_restart_is_timed_from_the_drain() -> None:
    *_, another = statuses = replaced("shard-1")
    draining = with_health(another, "shard-1", detail=f"{DRAINS}its units move to the other shards")
    gone = replace(WELL, processes=tuple(p for p in WELL.processes if p[0] != "shard-1"))
    assert told(*statuses, another, draining, draining, gone)[-1] == ("info", "shard-1", "has left after 2.0 s")


def test_a_restart_within_a_look_does_not_say_that_the_process_is_well_again() -> None:
    _, ending, *_, another = replaced("shard-1")
    assert told(ending, another) == [("info", "shard-1", "was replaced by another process, pid 77")]


def test_what_is_wrong_with_a_process_that_serves_on_is_told_once_and_when_it_ends() -> None:
    kept = with_health(WELL, "gateway-0", detail="kept the keys that were read before: no such file")
    assert told(WELL, kept, kept, WELL) == [
        ("bad", "gateway-0", "kept the keys that were read before: no such file"),
        ("good", "gateway-0", "is well again after 2.0 s"),
    ]


def test_quarantines_of_a_shard_and_of_units_begin_and_end() -> None:
    late = Quarantine(1, None, None, "answers are late")
    wrong = tuple(Quarantine(0, 3, unit, "sums are not finite") for unit in (5, 6))
    bad = with_health(WELL, "worker-0", quarantines=(late, *wrong))
    better = with_health(WELL, "worker-0", quarantines=wrong)
    assert set(told(WELL, bad)) == {
        ("bad", "worker-0", "quarantines shard-1: answers are late"),
        ("bad", "worker-0", "quarantines units of shard-0: unit 5 of layer 3: sums are not finite (and 1 more)"),
    }
    assert told(WELL, bad, bad, better)[2:] == [("good", "worker-0", "trusts shard-1 again after 2.0 s")]
