import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.sampler import SampleRow, filtered_weights, sample, uniform
from attention.sampling_params import SamplingParams


def params(**values):
    return SamplingParams(**{"seed": 1, "max_tokens": 1, **values})


def row(position=0, **values):
    return SampleRow(sampling_params=params(**values), output_position=position)


def kept(logits, **values):
    weights = filtered_weights(torch.tensor([logits]), [params(**values)])
    return weights[0].nonzero().squeeze(-1).tolist()


def kept_slowly(logits, temperature, min_p, top_k, top_p):
    """The filters, one token at a time, in double precision."""
    top = max(logits)
    weights = {i: math.exp((logit - top) / temperature) for i, logit in enumerate(logits)}
    weights = {i: weight for i, weight in weights.items() if weight >= min_p}
    order = sorted(weights, key=lambda i: (-weights[i], i))[: top_k or None]
    total, before, result = sum(weights[i] for i in order), 0.0, []
    for i in order:
        if top_p < 1.0 and result and before >= top_p * total:
            break
        result.append(i)
        before += weights[i]
    return sorted(result)


def test_greedy_takes_the_best_token_and_the_lower_id_of_a_tie():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 5.0, 5.0], [7.0, 7.0, 7.0]])
    assert [token.token_id for token in sample(logits, [row(temperature=0.0)] * 3)] == [1, 1, 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_spoil_their_own_row_only(bad, temperature):
    logits = torch.tensor([[0.0, 9.0, 1.0], [0.0, bad, 1.0], [-math.inf, 9.0, -math.inf], [-math.inf] * 3])
    tokens = sample(logits, [row(temperature=temperature, top_k=1, logprobs=2)] * 4)
    assert [token.is_finite for token in tokens] == [True, False, True, False]
    assert [tokens[0].token_id, tokens[2].token_id] == [1, 1]


def test_filters_by_hand():
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().tolist()
    assert kept(logits) == [0, 1, 2, 3]
    assert kept(logits, top_k=2) == [1, 3]
    assert kept(logits, top_p=0.69) == [1, 3]
    assert kept(logits, top_p=0.71) == [1, 2, 3]
    assert kept(logits, min_p=0.45) == [1, 2, 3]
    assert kept(logits, top_k=2, top_p=0.56) == [1]  # top_p counts what top_k left: 0.4 / 0.7 is above 0.56
    assert kept(logits, min_p=0.7, top_p=0.58) == [1, 3]
    assert kept(logits, top_p=1e-9) == [1]


def test_ties_for_the_last_place_go_to_the_lower_ids():
    assert kept([1.0, 2.0, 1.0, 1.0, 2.0], top_k=3) == [0, 1, 4]
    assert kept([0.0] * 8, top_p=0.5) == [0, 1, 2, 3]


def test_smallest_temperature_is_greedy_and_largest_is_uniform():
    logits = [1.0, 3.0, 2.0]
    assert kept(logits, temperature=1e-45) == [1]
    assert filtered_weights(torch.tensor([logits]), [params(temperature=3e38)])[0].tolist() == pytest.approx(
        [1 / 3] * 3
    )


@settings(max_examples=200, deadline=None)
@given(
    logits=st.lists(st.integers(-40, 40).map(lambda x: x / 8), min_size=2, max_size=30),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    min_p=st.sampled_from([0.0, 0.013, 0.21]),
    top_k=st.integers(0, 8),
    top_p=st.sampled_from([0.011, 0.333, 0.777, 0.951, 1.0]),
)
def test_filters_keep_what_the_slow_ones_keep(logits, temperature, min_p, top_k, top_p):
    expected = kept_slowly(logits, temperature, min_p, top_k, top_p)
    assert kept(logits, temperature=temperature, min_p=min_p, top_k=top_k, top_p=top_p) == expected


@pytest.mark.parametrize("values", [{"top_p": 0.9}, {"top_p": 0.999}, {"top_k": 1500}, {"top_k": 1500, "top_p": 0.5}])
def test_filters_of_a_large_vocabulary_keep_what_a_full_order_keeps(values):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, generator=generator).mul(0.5).tolist()
    expected = kept_slowly(logits, 1.0, 0.0, values.get("top_k", 0), values.get("top_p", 1.0))
    assert len(expected) > 500
    assert kept(logits, **values) == expected


def test_draws_follow_the_probabilities():
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.125])
    num_draws = 20_000
    logits = probabilities.log().expand(num_draws, -1)
    tokens = sample(logits, [row(position, seed=position % 7) for position in range(num_draws)])
    counts = torch.bincount(torch.tensor([token.token_id for token in tokens]), minlength=4)
    expected = probabilities * num_draws
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 16.3  # three degrees of freedom: exceeded once in a thousand


def test_uniform_numbers_differ_by_seed_and_by_position():
    numbers = [uniform(seed, position) for seed in (0, 1, 2**64 - 1) for position in range(1000)]
    assert len(set(numbers)) == 3000
    assert all(0.0 <= number < 1.0 for number in numbers)
    assert sum(numbers) / 3000 == pytest.approx(0.5, abs=0.02)


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(12)), st.integers(1, 12))
def test_a_row_gives_the_same_token_to_the_bit_whatever_is_beside_it(order, count):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(12, 1037, generator=generator) * 3
    kinds = [{}, {"top_p": 0.8}, {"top_k": 5}, {"temperature": 0.0}, {"min_p": 0.1, "top_p": 0.9}, {"temperature": 2.0}]
    rows = [row(i, seed=i, logprobs=3, **kinds[i % 6]) for i in range(12)]
    alone = [sample(logits[i : i + 1], [rows[i]])[0] for i in range(12)]
    chosen = order[:count]
    assert sample(logits[chosen], [rows[i] for i in chosen]) == [alone[i] for i in chosen]


def test_logprobs_are_of_the_logits_before_temperature_and_ties_go_to_the_lower_id():
    logits = torch.tensor([[0.1, 0.3, 0.3, 0.3]]).log()
    token = sample(logits, [row(temperature=0.0, top_k=1, logprobs=2)])[0]
    assert token.token_id == 1
    assert token.logprobs.logprob == pytest.approx(math.log(0.3))
    assert token.logprobs.top == ((1, token.logprobs.logprob), (2, token.logprobs.logprob))


def test_logprobs_are_absent_unless_asked_for_and_zero_gives_the_chosen_token_only():
    logits = torch.tensor([[0.0, 1.0]])
    assert sample(logits, [row()])[0].logprobs is None
    assert sample(logits, [row(logprobs=0)])[0].logprobs.top == ()
    assert len(sample(logits, [row(logprobs=20)])[0].logprobs.top) == 2
