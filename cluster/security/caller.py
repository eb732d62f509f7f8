"""Who makes the call that is being handled, for whatever serves it: limits, fairness, logs. Set by the key guard."""

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """One client of the gateway.

    Attributes:
        key_id: of the key that it showed; "" where none is needed. No secret: it may be logged and be a label.
        max_concurrent_requests: Generate calls in flight in a gateway, of all holders of the key; None: no own limit.
    """

    key_id: str = ""
    max_concurrent_requests: int | None = None


_caller: ContextVar[Caller] = ContextVar("caller", default=Caller())  # noqa: B039 (frozen)


def current_caller() -> Caller:
    """The caller of the call whose handler asks; anybody's where no keys are wanted."""
    return _caller.get()


def set_caller(caller: Caller) -> None:
    """For the rest of the call that is being handled."""
    _caller.set(caller)
