"""Settings of every test."""

import os
import sys
from collections.abc import Iterator

os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # else almost any call of Ray's starts a cluster that nobody ends

import pytest
import torch
from hypothesis import settings

from experts.kernels.library import native, set_num_threads
from protos import native_library
from router import compiled

settings.register_profile("mobula", deadline=None)  # a busy machine is not a fault
settings.load_profile("mobula")
torch.set_num_threads(1)

EXIT_STATUS = pytest.StashKey[int]()


@pytest.fixture(params=[1, 2, 16])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """The kernels' threads during the test."""
    set_num_threads(request.param)
    yield request.param
    set_num_threads(1)


@pytest.fixture(autouse=True)
def only_marked_tests_join_ray(request: pytest.FixtureRequest) -> Iterator[None]:
    """A cluster that one test leaves behind is what the next one would start its system on."""
    yield
    ray = sys.modules.get("ray")
    assert request.node.get_closest_marker("ray") or ray is None or not ray.is_initialized()


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine where the package was installed without a C++ compiler: no library is found."""
    libraries = (native, compiled.native)
    monkeypatch.setattr(native_library.importlib.machinery, "EXTENSION_SUFFIXES", [])
    for library in libraries:
        library.cache_clear()
        assert library() is None
    yield
    monkeypatch.undo()
    for library in libraries:
        library.cache_clear()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[EXIT_STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Ends at once: hundreds of systems have lived in this process, and native threads of the libraries that they used
    can keep an interpreter from ending for ever. Everything is told by then."""
    if (status := config.stash.get(EXIT_STATUS, None)) is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
