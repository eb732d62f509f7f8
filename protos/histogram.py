"""A Prometheus histogram whose counting is adding plain numbers: a step observes hundreds of times, a scrape is rare.

Knows nothing of registries; who owns it yields its series when somebody scrapes.
"""

from bisect import bisect_left
from collections.abc import Sequence

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.metrics_core import Metric


class TallyHistogram:
    """One thread observes; a scrape may see an observation half counted, never a wrong total afterwards."""

    def __init__(self, name: str, documentation: str, labels: dict[str, str], buckets: Sequence[float]) -> None:
        """buckets: upper bounds, ascending, without +Inf."""
        self._name = name
        self._documentation = documentation
        self._labels = labels
        self._buckets = tuple(buckets)
        self._counts = [0] * (len(buckets) + 1)
        self.total = 0.0  # sum of what was observed

    @property
    def count(self) -> int:
        """How often something was observed."""
        return sum(self._counts)

    def observe(self, value: float) -> None:
        """Counts the value in the first bucket that is not below it."""
        self._counts[bisect_left(self._buckets, value)] += 1
        self.total += value

    def metric(self) -> Metric:
        """The series so far."""
        family = HistogramMetricFamily(self._name, self._documentation, labels=tuple(self._labels))
        buckets, below = [], 0
        for bound, count in zip((*map(str, map(float, self._buckets)), "+Inf"), self._counts, strict=True):
            below += count
            buckets.append((bound, float(below)))
        family.add_metric(tuple(self._labels.values()), buckets, sum_value=self.total)
        return family
