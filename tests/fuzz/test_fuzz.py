"""The short form of `make fuzz`: every target, a few cases each, always the same."""

import pytest

from tests.fuzz.__main__ import all_targets
from tests.fuzz.target import Target, feed

NUM_CASES = 2500

TARGETS = all_targets()


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_hostile_input_is_taken_or_refused(target: Target) -> None:
    num_cases = -(-NUM_CASES * target.share // sum(target.share for target in TARGETS))
    outcome = feed(target, num_cases, seed_number=0)
    assert outcome.num_cases >= num_cases // 2, "hypothesis found no more that differ"
