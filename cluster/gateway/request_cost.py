"""What a request costs, in tokens, before anybody has read it: learned from those that have ended.

The gateway has no tokenizer; it knows how many bytes a request has. All averages forget: the last few dozen requests
count.
"""

from typing import NamedTuple

FIRST_BYTES_PER_TOKEN = 4.0  # until a request has ended
FIRST_COMPLETION_TOKENS = 128.0
WEIGHT = 0.05  # of the newest request


class RequestCost(NamedTuple):
    """Expected tokens of one request."""

    prompt_tokens: float
    completion_tokens: float

    @property
    def tokens(self) -> float:
        return self.prompt_tokens + self.completion_tokens


class CostModel:
    """Used from the event loop only."""

    def __init__(self) -> None:
        self._bytes_per_token = FIRST_BYTES_PER_TOKEN
        self._prompt_tokens: float | None = None
        self._completion_tokens = FIRST_COMPLETION_TOKENS
        self._seconds_per_token: float | None = None

    @property
    def mean_tokens(self) -> float:
        """Of a request, prompt and completion together."""
        return (self._prompt_tokens or 0.0) + self._completion_tokens

    @property
    def seconds_per_token(self) -> float | None:
        """That a request has a place for, per expected token; None until one has ended."""
        return self._seconds_per_token

    def estimate(self, num_bytes: int) -> RequestCost:
        """Of a request of so many bytes."""
        return RequestCost(max(1.0, num_bytes / self._bytes_per_token), self._completion_tokens)

    def learn_tokens(self, num_bytes: int, num_prompt_tokens: int, num_completion_tokens: int) -> None:
        """What a request that ended well had."""
        self._bytes_per_token = _mixed(self._bytes_per_token, num_bytes / max(1, num_prompt_tokens))
        self._completion_tokens = _mixed(self._completion_tokens, num_completion_tokens)
        prompt = self._prompt_tokens
        self._prompt_tokens = num_prompt_tokens if prompt is None else _mixed(prompt, num_prompt_tokens)

    def learn_time(self, cost: RequestCost, seconds: float) -> None:
        """How long a request of that expected cost had its place."""
        per_token = seconds / cost.tokens
        before = self._seconds_per_token
        self._seconds_per_token = per_token if before is None else _mixed(before, per_token)


def _mixed(before: float, newest: float) -> float:
    return (1.0 - WEIGHT) * before + WEIGHT * newest
