from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attention.layer_sampler import LayerSample, LayerSampler
from protos.errors import ShardUnavailable

ROWS = torch.zeros(3, 8)
CHOICE = torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.int64)


class Dispatcher:
    """Every handle is an object of its own; `fails` once."""

    def __init__(self) -> None:
        self.fails = False
        self.num_abandoned = 0

    def dispatch(self, *_: Any) -> SimpleNamespace:
        return SimpleNamespace(timings=[])

    def combine(self, _: Any) -> torch.Tensor:
        if self.fails:
            self.fails = False
            raise ShardUnavailable("shard 0 is down")
        return ROWS

    def abandon(self, _: Any) -> None:
        self.num_abandoned += 1


@pytest.fixture
def now() -> Callable[[], float]:
    times = iter(range(100))
    return lambda: float(next(times))


def layer(sampler: LayerSampler, layer_id: int) -> None:
    sampler.combine(sampler.dispatch(layer_id, ROWS, *CHOICE))


def test_everybody_who_asks_is_told_once_of_the_next_layer_that_begins(now: Callable[[], float]) -> None:
    sampler, told = LayerSampler(Dispatcher(), now), []
    layer(sampler, 1)
    sampler.ask(told.append)
    sampler.ask(told.append)
    layer(sampler, 2)
    layer(sampler, 3)
    assert told == [LayerSample(2, 3, 0.0, 1.0, ())] * 2


@pytest.mark.parametrize("is_abandoned", [False, True])
def test_a_layer_that_fails_is_not_told_of_and_the_next_one_that_is_asked_for_is(
    now: Callable[[], float], is_abandoned: bool
) -> None:
    dispatcher, told, late = Dispatcher(), [], []
    sampler = LayerSampler(dispatcher, now)
    sampler.ask(told.append)
    handle = sampler.dispatch(1, ROWS, *CHOICE)
    sampler.ask(late.append)
    if is_abandoned:
        sampler.abandon(handle)
        assert dispatcher.num_abandoned == 1
    else:
        dispatcher.fails = True
        with pytest.raises(ShardUnavailable):
            sampler.combine(handle)
    layer(sampler, 2)
    assert not told
    assert [sample.layer_id for sample in late] == [2]
