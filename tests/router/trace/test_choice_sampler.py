"""Choices are kept only while somebody takes them, whole, in order and in bounded memory."""

import numpy as np
import pytest
import torch

from router.trace import choice_sampler
from router.trace.choice_sampler import LINGER_S, ChoiceSampler
from router.trace.trace import TraceWindow, check_window
from tests.router.trace.traces import random_ids, tiny_model

MODEL = tiny_model(layers=3)


class Recorder:
    """The dispatcher behind it."""

    def __init__(self) -> None:
        self.layers: list[int] = []

    def dispatch(self, layer_id, hidden_states, topk_weights, topk_ids):
        self.layers.append(layer_id)
        return topk_ids

    def combine(self, handle):
        return handle

    def abandon(self, handle) -> None:
        self.layers.clear()


@pytest.fixture
def now() -> list[float]:
    return [0.0]


@pytest.fixture
def sampler(now) -> ChoiceSampler:
    return ChoiceSampler(Recorder(), MODEL, lambda: now[0])


def run(sampler: ChoiceSampler, *batches: np.ndarray, layers: int = 3) -> None:
    """A step: micro-batches side by side through the layers."""
    sampler.begin_step()
    for row, layer_id in enumerate(MODEL.moe_layer_ids[:layers]):
        for ids in batches:
            handle = sampler.dispatch(layer_id, torch.zeros(1), torch.zeros(1), torch.from_numpy(ids[row].astype("i8")))
            sampler.combine(handle)


def test_what_passes_between_two_takes_is_taken_whole_and_in_order(sampler) -> None:
    first, second, third = (random_ids(MODEL, count, seed) for seed, count in enumerate((5, 5, 2)))
    run(sampler, first)
    assert sampler.take(100).shape == (3, 0, 2)  # nobody had asked
    run(sampler, first, second)
    run(sampler, third)
    taken = sampler.take(100)
    check_window(TraceWindow(topk_ids=taken), MODEL)
    assert np.array_equal(taken, np.concatenate((first, second, third), axis=1))
    assert sampler.take(100).shape[1] == 0
    assert len(sampler._dispatcher.layers) == 12


def test_an_answer_has_a_limit_and_the_rest_comes_with_the_next_one(sampler) -> None:
    sampler.take(1)
    run(sampler, *(random_ids(MODEL, 4, seed) for seed in range(3)))
    assert [sampler.take(9).shape[1] for _ in range(3)] == [8, 4, 0]
    run(sampler, random_ids(MODEL, 10, 0), random_ids(MODEL, 3, 1))
    assert sampler.take(9).shape[1] == 3  # the other never fits


def test_a_step_that_failed_leaves_nothing_behind(sampler) -> None:
    sampler.take(1)
    run(sampler, random_ids(MODEL, 4, 0), layers=2)
    whole = random_ids(MODEL, 4, 1)
    run(sampler, whole)
    assert np.array_equal(sampler.take(100), whole)


def test_a_step_is_sampled_from_its_first_layer_on_or_not_at_all(sampler, now) -> None:
    assert not sampler.begin_step()
    sampler.take(1)  # while the step is under way
    for row, layer_id in enumerate(MODEL.moe_layer_ids):
        ids = torch.from_numpy(random_ids(MODEL, 4, 0)[row].astype("i8"))
        sampler.dispatch(layer_id, torch.zeros(1), torch.zeros(1), ids)
    assert sampler.take(100).shape[1] == 0
    assert sampler.begin_step()
    now[0] = LINGER_S + 1
    assert not sampler.begin_step()


def test_memory_is_bounded_and_freed_when_nobody_asks_any_more(sampler, now, monkeypatch) -> None:
    monkeypatch.setattr(choice_sampler, "MAX_BYTES", 10 * 3 * 2)
    sampler.take(1)
    for seed in range(5):
        run(sampler, random_ids(MODEL, 4, seed))
    assert sum(batch.num_tokens for batch in sampler._done) == 8
    now[0] = LINGER_S + 1
    run(sampler, random_ids(MODEL, 4, 9))
    assert not sampler._done
    assert sampler.take(100).shape[1] == 0
