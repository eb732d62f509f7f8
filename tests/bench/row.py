"""One line of the bench's table: what was measured, how it spread, how near the limit and the peers it came.

A part of the bench is a module with `rows(options) -> Iterator[Row]`. Knows nothing of how anything is measured.
"""

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

Param = str | int | float

PLAIN, INT8, INT4 = "bf16", "int8", "int4"
FORMATS = (PLAIN, INT8, INT4)  # of experts' weights
READ_PROBE = "read GB/s"  # params under which a row says what the machine gave in the same minutes
PEAK_PROBE = "peak GOP/s"
PROBES = (READ_PROBE, PEAK_PROBE)
WHY = "why"  # the param of a missing row that says why it is missing
LOWER_IS_BETTER = ("s", "ms", "us", "ns", "B", "KiB", "MiB", "GiB", "MB", "GB", "%")  # units


class Unmeasurable(Exception):
    """A part or a cell of the bench cannot run here; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A result.

    value: the median of the repeats, NaN in a row that could not be measured. spread: half of p90 - p10, over the
    median. limit_fraction: what was reached of the machine's limit, 1 is the limit. ratios: by peer, how many times
    better than the peer, so above 1 is good for times and bytes too.
    """

    name: str
    params: dict[str, Param] = field(default_factory=dict)
    value: float
    unit: str
    spread: float = 0.0
    limit_fraction: float | None = None
    ratios: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        name: str,
        params: Mapping[str, Param],
        samples: Sequence[float],
        unit: str,
        *,
        limits: Sequence[float] | None = None,
        turns: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    ) -> Self:
        """From repeats. limits: what the machine's limit was around each repeat, in the same unit.

        turns: by peer, (ours, theirs) of each time that both were measured one after the other.
        """
        value = statistics.median(samples)
        fraction = None
        if limits:
            fraction = statistics.median(better(s, li, unit) for s, li in zip(samples, limits, strict=True))
        ratios = {
            peer: statistics.median(better(ours, theirs, unit) for ours, theirs in pairs)
            for peer, pairs in (turns or {}).items()
            if pairs
        }
        return cls(
            name=name, params=dict(params), value=value, unit=unit, spread=spread(samples),
            limit_fraction=fraction, ratios=ratios,
        )  # fmt: skip

    @classmethod
    def missing(cls, name: str, params: Mapping[str, Param], why: str) -> Self:
        """In the place of a row that could not be measured."""
        return cls(name=name, params=dict(params) | {WHY: why}, value=math.nan, unit="")

    @property
    def is_missing(self) -> bool:
        return math.isnan(self.value)

    def with_params(self, **params: Param) -> Self:
        return replace(self, params=self.params | params)

    def as_json(self) -> dict[str, Any]:
        """A missing value is null."""
        return {
            "name": self.name,
            "params": self.params,
            "value": None if self.is_missing else self.value,
            "unit": self.unit,
            "spread": self.spread,
            "limit_fraction": self.limit_fraction,
            "ratios": self.ratios,
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        value = fields["value"]
        return cls(**(dict(fields) | {"value": math.nan if value is None else value}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the user asked for, and how a part says what it is doing.

    models: names of checkpoints (checkpoints.SHAPES, "bundled") or folders. formats: of their experts; start-up and
    memory are measured in the first one. folder: where made checkpoints are kept.
    num_threads: cores that the bench may use. deadline_s: on time.monotonic, after which no measurement begins.
    """

    only: tuple[str, ...]
    models: tuple[str, ...]
    formats: tuple[str, ...] = FORMATS
    folder: Path
    num_threads: int
    has_peers: bool = True
    is_quick: bool = False
    deadline_s: float = math.inf
    show: Callable[[str], None] = lambda text: None  # what is being measured now

    @property
    def num_repeats(self) -> int:
        """Of each measurement; with peers, turns of each."""
        return 2 if self.is_quick else 3

    def showing(self, show: Callable[[str], None]) -> "Options":
        """The same with another way to show what is being measured."""
        return replace(self, show=show)

    def seconds_left(self) -> float:
        return self.deadline_s - time.monotonic()

    def check_time(self, needed_s: float) -> None:
        """Raises Unmeasurable when a measurement of `needed_s` seconds would end after the deadline."""
        if self.seconds_left() < needed_s:
            raise Unmeasurable(f"out of time: needs about {needed_s:.0f} s, see --max-minutes")


def spread(samples: Sequence[float]) -> float:
    """Half of p90 - p10 over the median; 0 of a single sample."""
    if len(samples) < 2:
        return 0.0
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    middle = statistics.median(samples)
    return (deciles[-1] - deciles[0]) / 2 / abs(middle) if middle else 0.0


def better(ours: float, theirs: float, unit: str) -> float:
    """How many times better `ours` is: above 1 is good whatever the unit."""
    first, second = (theirs, ours) if unit in LOWER_IS_BETTER else (ours, theirs)
    return first / second if second else math.inf


def dump(rows: Iterable[Row], path: Path) -> None:
    """Writes the rows as a JSON list."""
    path.write_text(json.dumps([row.as_json() for row in rows], indent=1, allow_nan=False) + "\n", encoding="utf-8")


def load(path: Path) -> list[Row]:
    """What `dump` wrote."""
    return [Row.from_json(fields) for fields in json.loads(path.read_text(encoding="utf-8"))]
