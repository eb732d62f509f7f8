"""Log lines for machines."""

import json
import logging
from collections.abc import Iterator

import pytest

from cluster.config import ConfigError, LoggingConfig, LogLevel, parse_config
from cluster.logs import JsonLines, log_to_stderr


@pytest.fixture
def restored() -> Iterator[None]:
    """The root logger is as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


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


def test_a_level_that_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"logging\.level"):
        parse_config({"logging": {"level": "loud"}})
