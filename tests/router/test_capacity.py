import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from router.capacity import capacity_of, device_drop, dropless, gshard, switch
from tests.router import naive_gates

NUM_EXPERTS = 12
capacities = st.integers(1, 12)


def some_choices(num_tokens: int, top_k: int, seed: int, skew: float) -> tuple[Tensor, Tensor]:
    """Ids as a gate gives them, early experts more often; affinities with ties and zeros."""
    generator = torch.Generator().manual_seed(seed)
    popularity = torch.arange(1, NUM_EXPERTS + 1) ** -skew
    ids = torch.empty(0, top_k, dtype=torch.int64)
    if num_tokens:
        ids = torch.multinomial(popularity.expand(num_tokens, -1), top_k, generator=generator).sort(dim=-1).values
    affinities = torch.randint(0, 5, ids.shape, generator=generator) / 8
    return ids, affinities


cases = st.builds(
    some_choices, st.integers(0, 40), st.integers(1, 6), st.integers(0, 2**31), st.sampled_from([0.0, 0.5, 2.0])
)


def pairs(kept: Tensor) -> set[tuple[int, int]]:
    return {(token, column) for token, column in kept.nonzero().tolist()}


@settings(max_examples=400)
@given(case=cases, limit=capacities)
def test_switch_serves_tokens_in_order(case: tuple[Tensor, Tensor], limit: int) -> None:
    ids, _ = case
    assert pairs(switch(ids, capacity=limit)) == naive_gates.kept_by_switch(ids.tolist(), limit)


@settings(max_examples=400)
@given(case=cases, limit=capacities)
def test_gshard_serves_all_first_choices_before_any_second(case: tuple[Tensor, Tensor], limit: int) -> None:
    ids, affinities = case
    kept = pairs(gshard(ids, affinities, capacity=limit))
    assert kept == naive_gates.kept_by_gshard(ids.tolist(), affinities.tolist(), limit)


@settings(max_examples=400)
@given(case=cases, limit=capacities, num_devices=st.sampled_from([1, 2, 3, 4, 12]))
def test_device_drop_drops_the_lowest_affinities_of_each_device(
    case: tuple[Tensor, Tensor], limit: int, num_devices: int
) -> None:
    ids, affinities = case
    devices = [expert * num_devices // NUM_EXPERTS for expert in range(NUM_EXPERTS)]
    kept = device_drop(ids, affinities, expert_to_device=torch.tensor(devices), capacity=limit)
    assert pairs(kept) == naive_gates.kept_by_device(ids.tolist(), affinities.tolist(), devices, limit)


@settings(max_examples=200)
@given(case=cases, limit=capacities, seed=st.integers(0, 2**31))
def test_a_policy_fills_every_expert_and_serves_only_who_asks(
    case: tuple[Tensor, Tensor], limit: int, seed: int
) -> None:
    ids, affinities = case
    asked = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.7
    one_each = torch.arange(NUM_EXPERTS)
    for kept in (
        switch(ids, capacity=limit, asked=asked),
        gshard(ids, affinities, capacity=limit, asked=asked),
        device_drop(ids, affinities, expert_to_device=one_each, capacity=limit, asked=asked),
    ):
        assert not (kept & ~asked).any()
        served = ids[kept].bincount(minlength=NUM_EXPERTS)
        assert torch.equal(served, ids[asked].bincount(minlength=NUM_EXPERTS).clamp(max=limit))
    assert torch.equal(dropless(ids, asked=asked), asked)
    assert dropless(ids).all()


def test_the_policies_differ_by_hand() -> None:
    # Everybody wants expert 0; it is the first choice of the last token alone.
    ids = torch.tensor([[0, 1], [0, 2], [0, 3]])
    affinities = torch.tensor([[0.3, 0.5], [0.4, 0.6], [0.2, 0.1]])
    assert switch(ids, capacity=1).tolist() == [[True, True], [False, True], [False, True]]
    assert gshard(ids, affinities, capacity=1).tolist() == [[False, True], [False, True], [True, True]]
    by_device = device_drop(ids, affinities, expert_to_device=torch.tensor([0, 1, 1, 1]), capacity=1)
    assert by_device.tolist() == [[False, False], [True, True], [False, False]]


def test_equal_affinities_and_zeros_are_dropped_from_the_end() -> None:
    ids = torch.tensor([[0, 1]] * 3)
    one_device = torch.zeros(2, dtype=torch.int64)
    kept = device_drop(ids, torch.zeros(3, 2), expert_to_device=one_device, capacity=3)
    assert kept.tolist() == [[True, True], [True, False], [False, False]]
    assert gshard(ids, torch.zeros(3, 2), capacity=2).tolist() == [[True, True], [True, True], [False, False]]


@pytest.mark.parametrize(
    ("num_assignments", "num_takers", "factor", "minimum", "expected"),
    [
        (64, 8, 1.0, 1, 8),
        (64, 8, 1.25, 1, 10),
        (65, 8, 1.0, 1, 9),
        (30, 1, 0.1, 1, 3),
        (300, 1, 0.07, 1, 21),  # 21.000000000000004 in floating point
        (6, 160, 1.0, 1, 1),
        (6, 160, 1.0, 8, 8),
        (0, 8, 1.0, 1, 1),
    ],
)
def test_capacity_is_a_multiple_of_an_even_share_rounded_up(
    num_assignments: int, num_takers: int, factor: float, minimum: int, expected: int
) -> None:
    assert capacity_of(num_assignments, num_takers, factor, minimum) == expected
