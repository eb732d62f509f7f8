"""The short form of `make soak`, and how leaks are found."""

import pytest

from tests.soak.holdings import SPARE, Holdings, leaks, not_idle
from tests.soak.soak import SoakConfig, soak

SECONDS = 45.0


@pytest.mark.ray
def test_faults_one_after_the_other_lose_nothing_and_leave_nothing() -> None:
    lines: list[str] = []
    result = soak(SoakConfig(seconds=SECONDS, num_requests=100, fault_every_s=10.0, seed=5), lines.append)
    assert result.findings == [], lines
    assert sum(result.num_faults.values()) >= 3
    assert set(result.after) >= {"shard-0", "worker-1", "gateway-0"}


def test_more_of_anything_than_is_spare_is_a_leak() -> None:
    before = {"shard-0": Holdings(100.0, 20, 10, 2), "gone": Holdings(1.0, 1, 1, 1)}
    allowed = Holdings(100.0 + SPARE.memory_mib, 20 + SPARE.descriptors, 10 + SPARE.threads, 2 + SPARE.rings)
    assert leaks(before, {"shard-0": allowed, "new": Holdings(999.0, 999, 999, 999)}) == []
    assert leaks(before, {"shard-0": Holdings(100.0, 20 + SPARE.descriptors + 1, 10, 2)}) == [
        f"shard-0: descriptors was 20, is {21 + SPARE.descriptors}"
    ]


def test_an_idle_page_has_no_series_that_is_busy() -> None:
    page = 'mobula_num_requests_running{dp_rank="0"} 0.0\nmobula_latent_cache_usage_ratio{dp_rank="1"} 0.25\n# HELP x\n'
    assert not_idle(page) == {'mobula_latent_cache_usage_ratio{dp_rank="1"}': 0.25}
