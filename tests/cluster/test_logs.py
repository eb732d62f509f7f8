"""Log lines for machines."""

import io
import json
import logging
import os
import sys
from collections.abc import Iterator

import pytest
from rich.console import Console

from cluster.config import ConfigError, LoggingConfig, LogLevel, parse_config
from cluster.logs import JsonLines, PrintedLines, log_to_stderr


@pytest.fixture
def restored() -> Iterator[None]:
    """The root logger and Ray's are as they were."""
    loggers = {logger: (logger.handlers[:], logger.level) for logger in map(logging.getLogger, ("", "ray"))}
    propagate = logging.getLogger("ray").propagate
    yield
    for logger, (handlers, level) in loggers.items():
        logger.handlers[:] = handlers
        logger.setLevel(level)
    logging.getLogger("ray").propagate = propagate


def written(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_a_line_says_who_wrote_it_and_of_which_request(restored: None, capsys: pytest.CaptureFixture[str]) -> None:
    log_to_stderr(LoggingConfig(json_lines=True), "worker-1", lambda: 7)
    logging.getLogger("attention.engine").warning("request %s waits", "r1", extra={"request_id": "r1"})
    (line,) = written(capsys)
    assert line.pop("time")
    assert line == {
        "level": "warning",
        "process": "worker-1",
        "thread": "MainThread",
        "logger": "attention.engine",
        "message": "request r1 waits",
        "placement_version": 7,
        "request_id": "r1",
    }


def test_a_traceback_stays_on_its_line_and_what_is_not_known_is_left_out() -> None:
    error = ValueError("broken\nin two")
    info = (type(error), error, error.__traceback__)
    record = logging.LogRecord("x", logging.ERROR, "f.py", 1, "it failed", (), info)
    text = JsonLines("shard-0", lambda: None).format(record)
    assert "\n" not in text
    assert "broken\\nin two" in text
    assert "placement_version" not in json.loads(text)


def test_less_than_the_level_is_not_written(restored: None, capsys: pytest.CaptureFixture[str]) -> None:
    log_to_stderr(LoggingConfig(json_lines=True, level=LogLevel.ERROR), "gateway-0", lambda: None)
    logging.getLogger("x").warning("no")
    logging.getLogger("x").error("yes")
    assert [line["message"] for line in written(capsys)] == ["yes"]


def test_ray_logs_as_all_others_do(restored: None, capsys: pytest.CaptureFixture[str]) -> None:
    ray = logging.getLogger("ray")
    ray.addHandler(logging.StreamHandler(sys.stderr))
    ray.propagate = False
    log_to_stderr(LoggingConfig(json_lines=True), "serve", lambda: None)
    logging.getLogger("ray._private.services").warning("little shared memory")
    assert [line["message"] for line in written(capsys)] == ["little shared memory"]


def test_what_is_printed_is_an_object_for_each_call_without_colours() -> None:
    stream = io.StringIO()
    printed = PrintedLines(stream, JsonLines("serve", lambda: 3))
    print("\x1b[33m(raylet)\x1b[0m the disk\nis full", file=printed)
    Console(file=printed, force_terminal=True).print("\n[bold green]serving[/] bundled")
    print("\n", file=printed)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["message"] for line in lines] == ["(raylet) the disk\nis full", "serving bundled"]
    assert [(line["level"], line["process"], line["placement_version"]) for line in lines] == [("info", "serve", 3)] * 2


def test_text_that_is_printed_into_a_file_keeps_its_lines_and_loses_its_colours() -> None:
    stream = io.StringIO()
    printed = PrintedLines(stream, None)
    print("\x1b[33m(raylet)\x1b[0m the disk is full\n\n  by much", file=printed)
    assert stream.getvalue() == "(raylet) the disk is full\n\n  by much\n"
    assert not Console(file=printed).is_terminal


def test_text_without_an_end_of_its_line_is_written_at_the_end() -> None:
    stream = io.StringIO()
    printed = PrintedLines(stream, None)
    print("half a line", end="", file=printed)
    assert stream.getvalue() == ""
    printed.end()
    printed.end()
    assert stream.getvalue() == "half a line"


def test_a_reader_that_goes_away_is_found_by_the_descriptor_as_of_any_output() -> None:
    with open(os.devnull, "w", encoding="utf-8") as stream:
        printed = PrintedLines(stream, None)
        assert printed.fileno() == stream.fileno()
        assert printed.encoding == "utf-8"


def test_a_level_that_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"logging\.level"):
        parse_config({"logging": {"level": "loud"}})
