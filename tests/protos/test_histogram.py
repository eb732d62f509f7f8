from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.registry import Collector

from protos.histogram import TallyHistogram

BUCKETS = (0.5, 1, 2)
VALUES = (0.1, 0.5, 0.6, 1.0, 5.0)


class Owner(Collector):
    def __init__(self, histogram: TallyHistogram) -> None:
        self._histogram = histogram

    def describe(self):
        return ()

    def collect(self):
        yield self._histogram.metric()


def samples(registry: CollectorRegistry) -> dict:
    return {
        (sample.name, sample.labels.get("le")): sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if not sample.name.endswith("_created")
    }


def test_it_counts_like_the_library_s_own_histogram():
    theirs, ours = CollectorRegistry(), CollectorRegistry()
    library = Histogram("seconds", "Some.", ("rank",), buckets=BUCKETS, registry=theirs).labels("3")
    histogram = TallyHistogram("seconds", "Some.", {"rank": "3"}, BUCKETS)
    ours.register(Owner(histogram))
    for value in VALUES:
        library.observe(value)
        histogram.observe(value)
    assert samples(ours) == samples(theirs)
    assert (histogram.count, histogram.total) == (len(VALUES), sum(VALUES))
