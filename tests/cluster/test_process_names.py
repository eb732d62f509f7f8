"""How processes are named in sentences."""

import pytest

from cluster.process_names import listed


@pytest.mark.parametrize(
    ("ranks", "words"), [([4], "shard 4"), ([4, 5], "shards 4 and 5"), ([1, 4, 5], "shards 1, 4 and 5")]
)
def test_numbers_are_names_and_not_counts(ranks: list[int], words: str) -> None:
    assert listed("shard", ranks) == words
