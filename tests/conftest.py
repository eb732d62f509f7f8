"""Settings of every test."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from experts.kernels import library
from experts.kernels.library import native, set_num_threads

settings.register_profile("mobula", deadline=None)  # a busy machine is not a fault
settings.load_profile("mobula")
torch.set_num_threads(1)


@pytest.fixture(params=[1, 2, 16])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """The kernels' threads during the test."""
    set_num_threads(request.param)
    yield request.param
    set_num_threads(1)


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine where the package was installed without a C++ compiler: no library is found."""
    monkeypatch.setattr(library.importlib.machinery, "EXTENSION_SUFFIXES", [])
    native.cache_clear()
    assert native() is None
    yield
    monkeypatch.undo()
    native.cache_clear()
