"""How long a step's layers are waited for, and whether they may lack experts. Knows nothing of requests."""

import math
from collections.abc import Callable
from dataclasses import dataclass


def _always() -> bool:
    return True


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLimit:
    """What a step's requests have in common.

    deadline_s: a moment of the monotonic clock after which none of them is waited for.
    is_wanted: whether one of them still is; asked now and then, from the thread that waits.
    on_progress: told, in that thread, of every layer that is waited for, and again and again while it is.
    allows_missing_experts: whether all of them would rather have an answer that lacks experts than wait.
    on_missing_experts: told, in that thread, that a layer lacks some.
    """

    deadline_s: float = math.inf
    is_wanted: Callable[[], bool] = _always
    on_progress: Callable[[], None] = _nothing
    allows_missing_experts: bool = False
    on_missing_experts: Callable[[], None] = _nothing
