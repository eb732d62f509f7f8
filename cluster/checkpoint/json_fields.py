"""Typed access to config.json and its like: what is missing, wrong or unsupported is an error with its name and value.

Knows no field by name.
"""

import json
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.checkpoint.safetensors_file import InvalidCheckpoint
from protos.bounded_file import read_bounded, why_unreadable

MAX_SIZE = 2**31 - 1
MAX_FILE_BYTES = 64 * 1024 * 1024  # the index of a model of 671B parameters has 9 MB


class UnsupportedModel(ValueError):
    """The checkpoint asks for something that is not implemented."""


class InvalidModelConfig(InvalidCheckpoint):
    """config.json lacks something, contradicts itself or is not what it should be."""


def read_json_object(path: Path) -> dict[str, Any]:
    """Raises InvalidModelConfig if the file is missing or does not hold one JSON object."""
    try:
        content = json.loads(read_bounded(path, MAX_FILE_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidModelConfig(f"{path}: not readable as JSON: {why_unreadable(error)}") from error
    if not isinstance(content, dict):
        raise InvalidModelConfig(f"{path}: holds a {type(content).__name__}, expected a JSON object")
    return content


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """What the file's fields raise within has its path in front."""
    try:
        yield
    except (InvalidModelConfig, UnsupportedModel) as error:
        raise type(error)(f"{path}: {error}") from error


class JsonFields:
    """Typed access to one JSON object. A bool is no number here, and a number in quotes is none either."""

    def __init__(self, values: Mapping[str, Any], path: str = "") -> None:
        self.values = values
        self._path = path

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(name) is not None

    def integer(self, name: str, default: int | None = None, *, minimum: int = 1, maximum: int = MAX_SIZE) -> int:
        """A field without a default is required. The default is for null too."""
        value = self._value(name, default, "an integer")
        if type(value) is not int:
            raise self._wrong(name, "an integer")
        if not minimum <= value <= maximum:
            raise InvalidModelConfig(f"{self._path}{name} is {value}, must be {minimum} to {maximum}")
        return value

    def optional_integer(self, name: str, *, minimum: int = 1, maximum: int = MAX_SIZE) -> int | None:
        return self.integer(name, minimum=minimum, maximum=maximum) if self.has(name) else None

    def number(self, name: str, default: float | None = None) -> float:
        value = self._value(name, default, "a number")
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
            raise self._wrong(name, "a finite number")
        return float(value)

    def whole_number(self, name: str) -> int:
        """An integer that may be written as a float: 4096.0."""
        value = self.values.get(name)
        if isinstance(value, float) and value.is_integer():
            return JsonFields({name: int(value)}, self._path).integer(name)
        return self.integer(name)

    def boolean(self, name: str, default: bool) -> bool:
        value = self._value(name, default, "true or false")
        if type(value) is not bool:
            raise self._wrong(name, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._value(name, default, "a string")
        if type(value) is not str:
            raise self._wrong(name, "a string")
        return value

    def nested(self, name: str) -> "JsonFields | None":
        if not self.has(name):
            return None
        value = self.values[name]
        if not isinstance(value, dict):
            raise self._wrong(name, "an object or null")
        return JsonFields(value, f"{self._path}{name}.")

    def unsupported(self, name: str, supported: str) -> UnsupportedModel:
        return UnsupportedModel(f"{self._path}{name} is {self.values.get(name)!r}, supported is {supported}")

    def unknown(self, name: str, known: Collection[str]) -> UnsupportedModel:
        return UnsupportedModel(
            f"{self._path}{name} is {self.values.get(name)!r}, but no such key is supported; supported are "
            f"{', '.join(sorted(known))}"
        )

    def _value(self, name: str, default: object, expected: str) -> Any:
        value = self.values.get(name)
        if value is not None:
            return value
        if default is None:
            what = "null" if name in self.values else "missing"
            raise InvalidModelConfig(f"{self._path}{name} is {what}, expected {expected}")
        return default

    def _wrong(self, name: str, expected: str) -> InvalidModelConfig:
        return InvalidModelConfig(f"{self._path}{name} is {self.values[name]!r}, expected {expected}")
