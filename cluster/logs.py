"""A process's log lines on stderr: words for people, or a JSON object a line for what collects logs.

An object says which process and thread wrote it, under which placement, and of which request where there is one.
"""

import json
import logging
import sys
from collections.abc import Callable
from datetime import UTC, datetime

from cluster.config import LoggingConfig

FIELDS = ("request_id", "request_ids", "subject")  # that a line may have, given as `extra`
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


def log_to_stderr(config: LoggingConfig, process: str, placement_version: Callable[[], int | None]) -> None:
    """Replaces what the process did with log lines before."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(process, placement_version) if config.json_lines else logging.Formatter(TEXT))
    logging.basicConfig(level=config.level.upper(), handlers=[handler], force=True)
