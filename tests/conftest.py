"""Settings of every test."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("mobula", deadline=None)  # a busy machine is not a fault
settings.load_profile("mobula")
torch.set_num_threads(1)


@pytest.fixture(params=[1, 2, 16])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """torch's threads during the test: libraries cut matrix products by them, which may change the order of sums."""
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)
