"""What one client may have: requests in flight, and tokens a second. A client is a key, or an address without keys."""

from collections.abc import Callable
from dataclasses import dataclass

from protos.errors import ClientLimit

BURST_S = 10.0  # of its rate that a client may use at once after a pause


@dataclass(slots=True)
class _Client:
    num_requests: int = 0
    tokens: float = 0.0  # that it may still use; below 0 when it used more than was expected
    updated_s: float = 0.0


class ClientLimits:
    """Remembers only clients that have requests, or have used their tokens up."""

    def __init__(self, max_requests: int | None, max_tokens_per_s: float | None, clock: Callable[[], float]) -> None:
        """None: no limit."""
        self._max_requests = max_requests
        self._rate = max_tokens_per_s
        self._clock = clock
        self._clients: dict[str, _Client] = {}

    def enter(self, name: str, tokens: float, own_max_requests: int | None, hint_s: float) -> None:
        """A request that is expected to cost so many tokens. Raises ClientLimit.

        own_max_requests: of this client's key. hint_s: after which a place may be free.
        """
        client = self._client(name)
        limits = [limit for limit in (self._max_requests, own_max_requests) if limit is not None]
        if limits and client.num_requests >= min(limits):
            raise ClientLimit(
                f"{client.num_requests} requests of yours are in flight, limit is {min(limits)}; wait for one to end",
                retry_after_s=hint_s,
            )
        if self._rate is not None:
            if client.tokens <= 0.0:
                raise ClientLimit(
                    f"you have used more than your {self._rate:g} tokens a second; slow down",
                    retry_after_s=(1.0 - client.tokens) / self._rate,
                )
            client.tokens -= tokens
        client.num_requests += 1

    def leave(self, name: str, expected_tokens: float, tokens: float) -> None:
        """A request that had entered has ended, and cost so much."""
        client = self._client(name)
        client.num_requests -= 1
        client.tokens += expected_tokens - tokens
        self._forget_idle()

    def _client(self, name: str) -> _Client:
        now_s, full = self._clock(), (self._rate or 0.0) * BURST_S
        client = self._clients.setdefault(name, _Client(tokens=full, updated_s=now_s))
        if self._rate is not None:
            client.tokens = min(full, client.tokens + self._rate * (now_s - client.updated_s))
        client.updated_s = now_s
        return client

    def _forget_idle(self) -> None:
        full = (self._rate or 0.0) * BURST_S
        idle = [
            name
            for name, client in self._clients.items()
            if not client.num_requests
            and (self._rate is None or client.tokens + self._rate * (self._clock() - client.updated_s) >= full)
        ]
        for name in idle:
            del self._clients[name]
