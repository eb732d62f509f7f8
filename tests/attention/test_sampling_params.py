import math

import pytest

from attention.sampling_params import InvalidSamplingParams, SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", math.nan),
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_k", -1),
        ("min_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("seed", -1),
        ("seed", 2**64),
        ("max_tokens", 0),
        ("logprobs", -1),
        ("logprobs", 21),
        ("stop", ("",)),
        ("stop", ("x" * 257,)),
        ("stop", tuple("abcdefghijklmnopq")),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", tuple(range(257))),
    ],
)
def test_value_out_of_range_is_refused_with_its_field_and_limit(field, value):
    with pytest.raises(InvalidSamplingParams) as raised:
        SamplingParams(**{"seed": 0, "max_tokens": 1, field: value})
    assert raised.value.field == field
    assert raised.value.limit in str(raised.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", -0.5, "temperature is -0.5, must be 0 or more and finite"),
        ("stop", ("x",) * 1000, "stop has 1000 strings, must be at most 16 strings"),
        ("stop", ("x" * 10_000,), "stop has a text of 10000 characters, must be texts of at most 256 characters"),
        ("stop_token_ids", (1,) * 300, "stop_token_ids has 300 ids, must be at most 256 ids"),
    ],
)
def test_a_count_is_told_as_one_and_not_as_a_text(field, value, message):
    with pytest.raises(InvalidSamplingParams) as raised:
        SamplingParams(**{"seed": 0, "max_tokens": 1, field: value})
    assert str(raised.value) == message


def test_limits_themselves_are_allowed():
    params = SamplingParams(
        temperature=0.0, top_p=1.0, min_p=1.0, seed=2**64 - 1, max_tokens=1, logprobs=20, stop=("x" * 256,) * 16
    )
    assert params.is_greedy
