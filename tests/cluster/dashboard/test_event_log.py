"""What an operator reads of one status after another."""

from dataclasses import replace

from cluster.controller.process import ClusterStatus, ProcessState
from cluster.controller.rebalance import RebalanceState, RebalanceStatus
from cluster.dashboard.event_log import MAX_EVENTS, EventLog
from tests.fake_controller import life, rebalance_plan, serving_status


def lines(log: EventLog, after: int = 0) -> list[tuple[str, str, str]]:
    return [(event["level"], event["subject"], event["text"]) for event in log.after(after)]


def with_state(status: ClusterStatus, name: str, state: ProcessState, detail: str = "") -> ClusterStatus:
    processes = tuple(
        (other, replace(health, state=state, detail=detail) if other == name else health)
        for other, health in status.processes
    )
    return replace(status, processes=processes, is_serving=state is ProcessState.READY)


def test_the_first_status_is_one_line_and_the_same_again_is_none() -> None:
    log = EventLog()
    log.observe(serving_status(4), 10.0)
    log.observe(serving_status(4), 11.0)
    assert lines(log) == [("info", "system", "serves; placement version 4")]


def test_a_rebalance_is_told_from_its_beginning_to_its_end() -> None:
    log = EventLog()
    for number, status in enumerate(life(rebalance_plan())):
        log.observe(status, float(number))
    assert lines(log, after=1) == [
        ("info", "rebalance", "to version 2 began: 5.0 MiB to read"),
        ("info", "placement", "workers are told version 2"),
        ("good", "rebalance", "version 2 is served: 3 units moved"),
    ]


def test_a_rebalance_that_was_given_up_says_why() -> None:
    log = EventLog()
    for status in life(rebalance_plan(), aborted_while=RebalanceState.STAGING):
        log.observe(status, 0.0)
    assert lines(log)[-1] == ("bad", "rebalance", "version 2 was given up while staging: shard-1 was lost")


def test_one_that_came_and_went_between_two_looks_is_told_all_the_same() -> None:
    log = EventLog()
    log.observe(serving_status(1), 0.0)
    log.observe(serving_status(2, RebalanceStatus(num_done=1, last_result="version 2 is served")), 2.0)
    assert ("good", "rebalance", "version 2 is served") in lines(log)


def test_a_process_that_is_lost_and_replaced_is_three_lines() -> None:
    log, well = EventLog(), serving_status()
    log.observe(well, 0.0)
    log.observe(with_state(well, "shard-1", ProcessState.DOWN, "does not answer"), 1.0)
    log.observe(well, 2.0)
    assert lines(log, after=1) == [
        ("bad", "shard-1", "is down: does not answer"),
        ("bad", "system", "not every process is ready"),
        ("good", "shard-1", "is ready"),
        ("good", "system", "serves"),
    ]


def test_processes_that_join_and_leave_are_named() -> None:
    log, all_of_them = EventLog(), serving_status()
    log.observe(replace(all_of_them, processes=all_of_them.processes[1:]), 0.0)
    log.observe(replace(all_of_them, processes=all_of_them.processes[:-1]), 1.0)
    assert set(lines(log, after=1)) == {("info", "shard-0", "joined, is ready"), ("info", "gateway-0", "left")}


def test_only_the_newest_are_kept_and_numbers_go_on() -> None:
    log = EventLog()
    for version in range(MAX_EVENTS + 20):
        log.observe(serving_status(version), float(version))
    assert len(log.after(0)) == MAX_EVENTS
    assert log.after(0)[-1]["number"] == MAX_EVENTS + 20
    assert log.after(MAX_EVENTS + 19)[0]["time_s"] == float(MAX_EVENTS + 19)
