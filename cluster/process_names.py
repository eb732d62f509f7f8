"""Processes in words."""

from collections.abc import Sequence


def listed(role: str, ranks: Sequence[int]) -> str:
    """ranks: one at least. As people say it: shard 4; shards 4 and 5; shards 1, 4 and 5."""
    *others, last = map(str, ranks)
    return f"{role}s {', '.join(others)} and {last}" if others else f"{role} {last}"
