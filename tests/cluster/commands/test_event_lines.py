"""The log of `mobula serve`."""

import json
import logging
from collections.abc import Iterator

import pytest

from cluster.commands.event_lines import EventLines
from cluster.config import LoggingConfig
from cluster.logs import log_to_stderr
from tests.cluster.controller.test_status_events import DOWN, WELL


@pytest.fixture
def lines() -> Iterator[EventLines]:
    """The root logger is as it was afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield EventLines()
    root.handlers[:] = handlers
    root.setLevel(level)


def test_a_loss_is_one_plain_line_although_processes_log_warnings_only(
    lines: EventLines, capsys: pytest.CaptureFixture[str]
) -> None:
    log_to_stderr(LoggingConfig(), "serve", lambda: lines.placement_version)
    for status in (WELL, DOWN, WELL):
        lines.observe(status)
    written = [line.partition(" ")[2].partition(" ")[2] for line in capsys.readouterr().err.splitlines()]
    assert written[:3] == [
        "INFO mobula system serves; placement version 1",
        "WARNING mobula shard-1 is down: does not answer",
        "WARNING mobula system not every process is ready",
    ]


def test_the_same_is_an_object_with_its_subject_and_version(
    lines: EventLines, capsys: pytest.CaptureFixture[str]
) -> None:
    log_to_stderr(LoggingConfig(json_lines=True), "serve", lambda: lines.placement_version)
    lines.observe(WELL)
    lines.observe(DOWN)
    line = json.loads(capsys.readouterr().err.splitlines()[1])
    assert (line["level"], line["subject"], line["placement_version"]) == ("warning", "shard-1", 1)
    assert line["message"] == "shard-1 is down: does not answer"


def test_a_controller_that_is_started_again_is_told_once(lines: EventLines, capsys: pytest.CaptureFixture[str]) -> None:
    log_to_stderr(LoggingConfig(), "serve", lambda: None)
    for status in (WELL, None, None, WELL):
        lines.observe(status)
    written = capsys.readouterr().err.splitlines()
    assert len(written) == 3
    assert "controller is away, and is started again" in written[1]
    assert "controller is back after 0.0 s" in written[2]
