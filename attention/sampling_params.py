"""How tokens are chosen and when generation ends, as one value that cannot be wrong.

Knows nothing of protobuf or of a model's defaults: attention/request.py fills those in.
"""

import math
from dataclasses import dataclass

MAX_NUM_LOGPROBS = 20  # alternatives per token; each costs a place in every answer
MAX_NUM_STOP_STRINGS = 16  # each is matched against every new character
MAX_STOP_STRING_CHARS = 256  # text may be held back for this long
MAX_NUM_STOP_TOKEN_IDS = 256  # kept per sequence
MAX_SEED = 2**64 - 1


class InvalidSamplingParams(ValueError):
    """A sampling parameter outside its limits.

    Attributes:
        field: the parameter's name.
        value: what was given.
        limit: what is allowed, in words.
    """

    def __init__(self, field: str, value: object, limit: str, what: str = "") -> None:
        """what: is wrong with a value that is too long to show."""
        super().__init__(f"{field} {what or f'is {value!r}'}, must be {limit}")
        self.field = field
        self.value = value
        self.limit = limit


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Checks itself when made. Raises InvalidSamplingParams."""

    temperature: float = 1.0  # logits are divided by it; 0 is greedy
    top_p: float = 1.0  # probability mass that is kept, in (0, 1]
    top_k: int = 0  # tokens that are kept; 0 for all
    min_p: float = 0.0  # kept tokens are at least this fraction as probable as the best one
    seed: int  # of the request's random draws
    max_tokens: int  # new tokens at most
    stop: tuple[str, ...] = ()  # texts that end the generation
    stop_token_ids: tuple[int, ...] = ()  # tokens that end the generation
    ignore_eos: bool = False  # go on after an end-of-sequence token
    logprobs: int | None = None  # alternatives reported per token; None for no log probabilities at all
    skip_special_tokens: bool = True  # leave special tokens out of the text

    def __post_init__(self) -> None:
        _require(0.0 <= self.temperature < math.inf, "temperature", self.temperature, "0 or more and finite")
        _require(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "above 0 and at most 1")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (all tokens) or more")
        _require(0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "0 to 1")
        _require(0 <= self.seed <= MAX_SEED, "seed", self.seed, f"0 to {MAX_SEED}")
        _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "1 or more")
        if self.logprobs is not None:
            _require(0 <= self.logprobs <= MAX_NUM_LOGPROBS, "logprobs", self.logprobs, f"0 to {MAX_NUM_LOGPROBS}")
        self._check_stops()

    def _check_stops(self) -> None:
        count = len(self.stop)
        _require(
            count <= MAX_NUM_STOP_STRINGS,
            "stop",
            self.stop,
            f"at most {MAX_NUM_STOP_STRINGS} strings",
            f"has {count} strings",
        )
        for text in self.stop:
            _require(text != "", "stop", text, "texts of at least one character")
            _require(
                len(text) <= MAX_STOP_STRING_CHARS,
                "stop",
                text,
                f"texts of at most {MAX_STOP_STRING_CHARS} characters",
                f"has a text of {len(text)} characters",
            )
        count = len(self.stop_token_ids)
        _require(
            count <= MAX_NUM_STOP_TOKEN_IDS,
            "stop_token_ids",
            self.stop_token_ids,
            f"at most {MAX_NUM_STOP_TOKEN_IDS} ids",
            f"has {count} ids",
        )
        for token_id in self.stop_token_ids:
            _require(token_id >= 0, "stop_token_ids", token_id, "ids of 0 or more")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


def _require(is_valid: bool, field: str, value: object, limit: str, what: str = "") -> None:
    if not is_valid:
        raise InvalidSamplingParams(field, value, limit, what)
