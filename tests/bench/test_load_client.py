import pytest

from tests.bench.load_client import FIRST_TOKEN_ID, Stream, random_prompt, steady_rate
from tests.bench.row import Unmeasurable


def stream(first_s: float, num_tokens: int, interval_s: float = 0.1) -> Stream:
    return Stream(sent_s=0.0, times_s=tuple(first_s + interval_s * number for number in range(num_tokens)))


def test_rate_counts_only_while_all_streams_decode() -> None:
    early = Stream(sent_s=0.0, times_s=(0.0, 5.0, 10.0, 10.1, 10.2, 10.3))  # slow beside the other's prompt
    late = stream(10.0, 9)
    assert steady_rate([early, late]) == pytest.approx(20.0)


def test_step_that_is_half_delivered_at_the_ends_does_not_matter() -> None:
    first, second = stream(1.0, 30), stream(1.00001, 30)
    assert steady_rate([first, second]) == pytest.approx(20.0)


def test_streams_that_never_ran_together_are_no_measurement() -> None:
    with pytest.raises(Unmeasurable, match="more tokens are needed"):
        steady_rate([stream(0.0, 5), stream(10.0, 5)])


def test_first_token_is_counted_from_the_request() -> None:
    assert stream(2.5, 3).first_token_s == 2.5


def test_prompts_are_random_repeatable_and_without_special_tokens() -> None:
    prompt = random_prompt(1000, 320, seed=1)
    assert prompt == random_prompt(1000, 320, seed=1)
    assert prompt != random_prompt(1000, 320, seed=2)
    assert FIRST_TOKEN_ID <= min(prompt) <= max(prompt) < 320
