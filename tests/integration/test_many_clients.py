"""Many stock clients at once: every request is answered as it would be alone, and what is cancelled leaves nothing."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from experts.kernels.library import native
from protos import generation_pb2 as pb
from protos import generation_pb2_grpc
from tests.checkpoints import write_checkpoint
from tests.system import TIMEOUT_S, System

NUM_REQUESTS, NUM_CLIENTS = 200, 20
IDLE_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Job:
    """One request; cancelled after `cancel_after` tokens if that is set."""

    prompt: list[int]
    num_tokens: int
    cancel_after: int | None


def random_jobs(seed: int) -> list[Job]:
    """Mixed lengths; a tenth is cancelled at a random point."""
    rng = random.Random(seed)
    jobs = []
    for number in range(NUM_REQUESTS):
        prompt = [rng.randrange(3, 320) for _ in range(rng.choice((1, 4, 16, 40, 120, 200)))]
        num_tokens = rng.randint(1, 16)
        jobs.append(Job(prompt, num_tokens, rng.randint(0, num_tokens - 1) if number % 10 == 0 else None))
    return jobs


def run(stub: generation_pb2_grpc.InferenceStub, job: Job) -> list[int]:
    params = pb.SamplingParams(temperature=0.0, max_tokens=job.num_tokens, ignore_eos=True)
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=job.prompt), sampling_params=params)
    call = stub.Generate(request, timeout=TIMEOUT_S)
    if job.cancel_after == 0:
        call.cancel()
        return []
    token_ids: list[int] = []
    for answer in call:
        token_ids.extend(answer.token_ids)
        if job.cancel_after is not None and len(token_ids) >= job.cancel_after:
            call.cancel()
            break
    return token_ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), "v2", seed=11, num_hidden_layers=2)


def test_two_hundred_requests_of_twenty_clients_are_answered_as_if_alone(folder: Path) -> None:
    jobs = random_jobs(seed=5)
    waiting = list(jobs)
    lock = threading.Lock()
    answers: dict[int, list[int]] = {}

    def client(address: str) -> None:
        with grpc.insecure_channel(address) as channel:  # each client has its own connection
            stub = generation_pb2_grpc.InferenceStub(channel)
            while True:
                with lock:
                    if not waiting:
                        return
                    job = waiting.pop()
                answers[id(job)] = run(stub, job)

    # A small cache, so that blocks run out and sequences are preempted.
    engine = {"max_num_seqs": 16, "max_num_batched_tokens": 256, "num_blocks": 24, "block_size": 32}
    # In bf16, where other bits soon are other tokens; torch promises equal bits to rounding only.
    dtype = "float32" if native() is None else "bfloat16"
    with System(folder, num_workers=2, num_shards=3, dtype=dtype, attention_workers={"engine": engine}) as system:
        with ThreadPoolExecutor(max_workers=NUM_CLIENTS) as pool:
            list(pool.map(client, [system.address] * NUM_CLIENTS))
        assert system.becomes_idle(), "blocks or queues are not empty"
        alone = {id(job): system.greedy(job.prompt, job.num_tokens) for job in jobs}

    assert len(answers) == NUM_REQUESTS
    for job in jobs:
        answer = answers[id(job)]
        if job.cancel_after is None:
            assert answer == alone[id(job)]
        else:
            assert answer == alone[id(job)][: len(answer)]
