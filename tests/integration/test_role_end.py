"""A process that stops keeps nothing: what goes on in it would hold ports, memory and whoever waits."""

import threading
import time
from pathlib import Path

from experts.kernels.library import native
from tests.checkpoints import write_checkpoint
from tests.system import System

GIVE_UP_S = 10.0
OF_GRPC = "_poll_wrapper"  # one thread for all loops of a process, for as long as it lives


def test_roles_that_have_stopped_leave_no_thread(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", "v2", seed=7, num_hidden_layers=2)
    before = set(threading.enumerate())
    with System(folder, num_workers=1, num_shards=2, dtype="float32" if native() is None else "bfloat16") as system:
        system.greedy([5, 90, 17], 4)
        watched = [role._watch.name for role in (*system.shards, *system.workers) if role._watch is not None]
        assert watched == ["experts", "experts", "engine"]
        assert {"loop", "engine", "experts", "http"} <= {thread.name for thread in set(threading.enumerate()) - before}
    give_up_s = time.monotonic() + GIVE_UP_S
    while left := [t.name for t in set(threading.enumerate()) - before if OF_GRPC not in t.name]:
        assert time.monotonic() < give_up_s, left
        time.sleep(0.05)
