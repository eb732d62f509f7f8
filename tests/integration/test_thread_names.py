"""Whoever looks at a process with py-spy or a debugger reads what each of its threads is for."""

import re
import socket
import socketserver
import sys
import threading
import traceback
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.config import RebalancingConfig
from tests.checkpoints import write_checkpoint
from tests.fake_controller import FakeController, admin_server
from tests.integration.test_live_rebalance import controlled
from tests.system import System

ROOT = Path(__file__).parents[2]
PACKAGES = ("attention", "cluster", "experts", "protos", "router")
UNNAMED = re.compile(r"(Thread|ThreadPoolExecutor|Dummy)-\d+")  # what Python calls those that nobody named


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    model = write_checkpoint(tmp_path_factory.mktemp("model"), "v2", seed=4)
    with System(model, num_workers=1, num_shards=2) as system:
        yield system


def product_threads() -> dict[str, str]:
    """Names of the threads that run the product's code now, its HTTP servers too, and the frames of each."""
    folders = (*(f"{ROOT / package}/" for package in PACKAGES), socketserver.__file__)
    frames = sys._current_frames()
    found = {}
    for thread in threading.enumerate():
        stack = traceback.extract_stack(frames[thread.ident]) if thread.ident in frames else []
        if any(frame.filename.startswith(folders) for frame in stack):
            found[thread.name] = "".join(traceback.format_list(stack))
    return found


def test_every_thread_that_runs_the_product_has_a_name(system: System) -> None:
    host, _, port = system.gateway.health().metrics_address.partition(":")
    with (
        controlled(system, rebalancing=RebalancingConfig()) as (controller, _),
        admin_server(FakeController()),
        socket.create_connection((host, int(port))) as silent,  # a call that is being read
    ):
        system.greedy([1, 2, 3], 8)
        urllib.request.urlopen(f"http://{host}:{port}/metrics").close()
        controller.plan_rebalance()
        silent.sendall(b"GET /met")
        found = product_threads()
    assert {name: stack for name, stack in found.items() if UNNAMED.match(name)} == {}
    assert {"controller", "engine", "experts", "http", "http-call", "ring", "dashboard-log"} <= set(found)


def test_a_thread_without_a_name_is_noticed() -> None:
    from protos.loop_thread import LoopThread

    loop = LoopThread("x")
    loop._thread.name = "Thread-77"
    try:
        assert any(UNNAMED.match(name) for name in product_threads())
    finally:
        loop.stop()
