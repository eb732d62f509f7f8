"""How long anybody waits for a step's layers. Knows nothing of requests."""

import math
from collections.abc import Callable
from dataclasses import dataclass


def _always() -> bool:
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLimit:
    """What a step's requests have in common.

    deadline_s: a moment of the monotonic clock after which none of them is waited for.
    is_wanted: whether one of them still is; asked now and then, from the thread that waits.
    """

    deadline_s: float = math.inf
    is_wanted: Callable[[], bool] = _always
