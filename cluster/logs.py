"""A process's log lines on stderr: words for people, or a JSON object a line for what collects logs.

An object says which process and thread wrote it, under which placement, and of which request where there is one. What
a command prints can become such lines too.
"""

import atexit
import io
import json
import logging
import re
import sys
import textwrap
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TextIO

from cluster.config import LoggingConfig

FIELDS = ("request_id", "request_ids", "subject")  # that a line may have, given as `extra`
COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # and bold, dim and the like
TEXT = "%(asctime)s %(levelname)s %(name)s %(message)s"


class JsonLines(logging.Formatter):
    """placement_version: of the process now; None while it has none."""

    def __init__(self, process: str, placement_version: Callable[[], int | None]) -> None:
        super().__init__()
        self._process = process
        self._placement_version = placement_version

    def format(self, record: logging.LogRecord) -> str:
        """Without line breaks; a traceback is one of its fields."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self._process,
            "thread": record.threadName,
            "logger": record.name,
            "message": record.getMessage(),
            "placement_version": self._placement_version(),
        }
        line |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps({name: value for name, value in line.items() if value is not None}, ensure_ascii=False)


class PrintedLines(io.TextIOBase):
    """In place of stdout where no terminal shows it: nothing is coloured, for Ray colours what it prints anywhere.

    With `json_lines` what one call prints is one object.
    """

    def __init__(self, stream: TextIO, json_lines: JsonLines | None) -> None:
        super().__init__()
        self._stream = stream
        self._json_lines = json_lines
        self._lock = threading.Lock()
        self._begun = ""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        """Of what is written to: whoever finds a pipe closed puts something else in its place."""
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    def write(self, text: str, /) -> int:
        """Keeps what does not end with a line yet."""
        with self._lock:
            self._begun += COLOUR.sub("", text)
            if self._begun.endswith("\n"):
                self._write()
        return len(text)

    def end(self) -> None:
        """Writes what has no end of its line. Raises OSError."""
        with self._lock:
            if self._begun:
                self._write()

    def _write(self) -> None:
        printed, self._begun = self._begun, ""
        self._stream.write(self._as_object(printed) if self._json_lines else printed)
        self._stream.flush()

    def _as_object(self, printed: str) -> str:
        message = "\n".join(line.rstrip() for line in textwrap.dedent(printed).splitlines()).strip()
        record = logging.LogRecord("mobula", logging.INFO, "", 0, message, None, None)
        return f"{self._json_lines.format(record)}\n" if self._json_lines and message else ""


def log_to_stderr(config: LoggingConfig, process: str, placement_version: Callable[[], int | None]) -> None:
    """Replaces what the process did with log lines before; Ray's are written like all others."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(process, placement_version) if config.json_lines else logging.Formatter(TEXT))
    logging.basicConfig(level=config.level.upper(), handlers=[handler], force=True)
    ray = logging.getLogger("ray")
    ray.handlers.clear()
    ray.propagate = True


def print_lines(config: LoggingConfig, process: str, placement_version: Callable[[], int | None]) -> None:
    """From now on stdout has whole lines, as PrintedLines writes them; a terminal is left as it is without
    `json_lines`.
    """
    if config.json_lines or not sys.stdout.isatty():
        json_lines = JsonLines(process, placement_version) if config.json_lines else None
        sys.stdout = printed = PrintedLines(sys.stdout, json_lines)
        atexit.register(printed.end)
