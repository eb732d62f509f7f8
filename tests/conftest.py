"""Settings of every test."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from experts.kernels.library import set_num_threads

settings.register_profile("mobula", deadline=None)  # a busy machine is not a fault
settings.load_profile("mobula")
torch.set_num_threads(1)


@pytest.fixture(params=[1, 2, 16])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """The kernels' threads during the test."""
    set_num_threads(request.param)
    yield request.param
    set_num_threads(1)
