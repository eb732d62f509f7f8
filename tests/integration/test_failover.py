"""One of two replicas' shards is killed, stopped, slowed or damaged while requests run: none fails, no token changes.

Real roles, real gRPC and rings, each shard a process of its own; only Ray is not there.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import numpy as np
import pytest

from protos import generation_pb2 as pb
from tests.checkpoints import write_checkpoint
from tests.shard_process import ShardProcess
from tests.system import HOST, System

NUM_CLIENTS, NUM_TOKENS = 3, 40


class Load:
    """Clients that ask one request after the other, until told to stop."""

    def __init__(self, system: System, expected: list[list[int]]) -> None:
        self._system = system
        self._expected = expected
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(NUM_CLIENTS)]
        self.failures: list[str] = []
        self.num_done = 0
        self.gaps_s: list[float] = []

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _run(self, index: int) -> None:
        try:
            while not self._is_over.is_set():
                self._ask(index)
        except grpc.RpcError as error:
            self.failures.append(repr(error))

    def _ask(self, index: int) -> None:
        tokens, before_s = [], time.monotonic()
        for answer in self._system.stub.Generate(request(index), timeout=60):
            now_s = time.monotonic()
            self.gaps_s.append(now_s - before_s)
            before_s = now_s
            tokens += answer.token_ids
        if tokens != self._expected[index]:
            self.failures.append(f"client {index} got other tokens")
        self.num_done += 1


def request(index: int) -> pb.GenerateRequest:
    params = pb.SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt(index)), sampling_params=params)


def prompt(index: int) -> list[int]:
    return [(7 * index + 3 * i) % 90 for i in range(5 + index)]


@pytest.fixture
def running(request, tmp_path) -> Iterator[tuple[System, list[list[int]]]]:
    """A system of three shards in processes of their own, and the tokens that it gives. Its parameter: MiB of rings."""
    model = write_checkpoint(tmp_path, "v2")
    workers = {"num_threads": 1, "num_micro_batches": 2, "router": {"shared_memory_mib": request.param}}
    shards = {"num_replicas": 2, "num_threads": 1}
    system = System(model, num_shards=3, expert_shards=shards, attention_workers=workers)
    data = {"model": str(model), "expert_shards": {"count": 3} | shards}
    system.shards = [ShardProcess(data, rank, HOST) for rank in range(3)]
    with system:
        yield system, [system.greedy(prompt(index), NUM_TOKENS) for index in range(NUM_CLIENTS)]


@contextmanager
def killed(shard: ShardProcess) -> Iterator[None]:
    shard.signal(signal.SIGKILL)
    yield


@contextmanager
def stopped(shard: ShardProcess) -> Iterator[None]:
    shard.signal(signal.SIGSTOP)
    yield
    shard.signal(signal.SIGCONT)


@contextmanager
def slowed(shard: ShardProcess) -> Iterator[None]:
    with shard.slowed(20.0):
        yield


@contextmanager
def not_a_number(shard: ShardProcess) -> Iterator[None]:
    shard.ask("nan")
    yield


@pytest.mark.parametrize(
    ("running", "faults"),
    [
        (256, [(slowed, 0, 1.0), (stopped, 1, 1.0), (killed, 2, 0.4)]),
        (0, [(stopped, 0, 1.0), (not_a_number, 1, 0.4), (killed, 1, 0.4)]),
    ],
    indirect=["running"],
    ids=["ring", "grpc"],
)
def test_faults_of_one_shard_after_the_other_fail_no_request_and_change_no_token(running, faults):
    system, expected = running
    with Load(system, expected) as load:
        for fault, ep_rank, max_stall_s in faults:
            wait_for(load, load.num_done + NUM_CLIENTS)
            load.gaps_s.clear()
            with fault(system.shards[ep_rank]):
                time.sleep(1.5)
                wait_for(load, load.num_done + NUM_CLIENTS)
                p50_s, p99_s, max_s = np.percentile(load.gaps_s, [50, 99, 100])
            print(f"{fault.__name__}: p50 {p50_s:.3f} s, p99 {p99_s:.3f} s, max {max_s:.3f} s")
            assert p99_s < max_stall_s, fault
            assert max_s < 5.0, fault
            if fault is not_a_number:
                quarantines = system.workers[0].health().quarantines
                assert ep_rank in {quarantine.ep_rank for quarantine in quarantines}
    assert load.failures == []
    assert system.becomes_idle()


def wait_for(load: Load, num_done: int) -> None:
    give_up_s = time.monotonic() + 60
    while load.num_done < num_done and not load.failures:
        assert time.monotonic() < give_up_s
        time.sleep(0.01)
