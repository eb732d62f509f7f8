"""The dashboard's log of what happened."""

from cluster.dashboard.event_log import MAX_EVENTS, EventLog
from tests.fake_controller import serving_status


def test_the_first_status_is_one_line_and_the_same_again_is_none() -> None:
    log = EventLog()
    log.observe(serving_status(4), 10.0)
    log.observe(serving_status(4), 11.0)
    assert log.after(0) == [
        {"number": 1, "time_s": 10.0, "level": "info", "subject": "system", "text": "serves; placement version 4"}
    ]


def test_only_the_newest_are_kept_and_numbers_go_on() -> None:
    log = EventLog()
    for version in range(MAX_EVENTS + 20):
        log.observe(serving_status(version), float(version))
    assert len(log.after(0)) == MAX_EVENTS
    assert log.after(0)[-1]["number"] == MAX_EVENTS + 20
    assert log.after(MAX_EVENTS + 19)[0]["time_s"] == float(MAX_EVENTS + 19)
