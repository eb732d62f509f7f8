"""A rebalance under load: what users feel while experts move, whether anything fails or changes, and what is moved.

Clients send the same prompts again and again, and every answer is compared with the first one of its prompt. Prompts
are of few distinct tokens, which use few experts; from one rebalance to the next they are others, so that the load asks
for other places.
"""

import itertools
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from cluster.client import AdminClient
from protos import admin_pb2, generation_pb2_grpc
from protos import generation_pb2 as pb
from tests.bench.load_client import CALL_TIMEOUT_S, FIRST_TOKEN_ID
from tests.bench.measured_model import MeasuredModel, measured_models
from tests.bench.row import Options, Row, Unmeasurable

NAME = "rebalance"
NUM_SHARDS, NUM_CLIENTS = 3, 4
PROMPT_TOKENS, NEW_TOKENS = 32, 48
NUM_REBALANCES = 4
WARM_UP_S, BEFORE_S = 4.0, 12.0  # of each load, before its latency counts; of latency before a rebalance
TIMEOUT_S = 120.0
SETTINGS: dict[str, Any] = {
    "num_shards": NUM_SHARDS,
    "expert_shards": {"redundancy": 0.25, "rebalancing": {"half_life_s": 5.0, "min_assignments": 0}},
}


@dataclass(slots=True)
class Traffic:
    """What the clients have seen. times_s: when each stream's tokens came, on time.perf_counter."""

    prompts: list[list[int]]
    stopping: threading.Event = field(default_factory=threading.Event)
    first: dict[int, list[int]] = field(default_factory=dict)
    num_requests: int = 0
    num_failed: int = 0
    num_changed: int = 0
    times_s: list[list[float]] = field(default_factory=list)

    def run_client(self, address: str, number: int) -> None:
        with grpc.insecure_channel(address) as channel:
            stub = generation_pb2_grpc.InferenceStub(channel)
            while not self.stopping.is_set():
                try:
                    self._request(stub, number)
                except grpc.RpcError:
                    self.num_failed += 1
                self.num_requests += 1

    def _request(self, stub: generation_pb2_grpc.InferenceStub, number: int) -> None:
        params = pb.SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=self.prompts[number]), sampling_params=params)
        tokens: list[int] = []
        times: list[float] = []
        for answer in stub.Generate(request, timeout=CALL_TIMEOUT_S):
            times += [time.perf_counter()] * len(answer.token_ids)
            tokens += answer.token_ids
        self.times_s.append(times)
        self.num_changed += self.first.setdefault(number, tokens) != tokens

    def gaps_ms(self, begin_s: float, end_s: float) -> list[float]:
        """Between two tokens of a stream, of those that came in between."""
        return [
            1e3 * (later - earlier)
            for times in list(self.times_s)
            for earlier, later in itertools.pairwise(times)
            if begin_s <= later <= end_s
        ]


def rows(options: Options) -> Iterator[Row]:
    """By model: latency before and while experts move, and the counts."""
    for model in measured_models(options, options.formats[:1]):
        if not isinstance(model, MeasuredModel):
            name, kind, why = model
            yield Row.missing(NAME, {"model": name, "format": kind}, why)
            continue
        try:
            options.check_time(60.0)
            with model.served(options, **SETTINGS) as (system, client):
                yield from _measure(model, system.address, client.vocab_size, options)
        except (Unmeasurable, grpc.RpcError) as error:
            yield Row.missing(NAME, model.params, str(error))


def _measure(model: MeasuredModel, address: str, vocab_size: int, options: Options) -> Iterator[Row]:
    before: list[float] = []
    during: list[float] = []
    seconds: list[float] = []
    total = Traffic(prompts=[])
    planned = moved = 0
    with AdminClient(address) as admin:
        for number in range(2 if options.is_quick else NUM_REBALANCES):
            options.show(f"{model.name} {model.kind}: rebalance {number + 1}")
            with _traffic(address, number, vocab_size) as traffic:
                time.sleep(WARM_UP_S)
                quiet_s = time.perf_counter()
                time.sleep(BEFORE_S)
                begin_s = time.perf_counter()
                plan = admin.rebalance(is_dry_run=False)
                status = _wait_until_idle(admin)
                end_s = time.perf_counter()
                time.sleep(1.0)
            if plan.moves:
                before += traffic.gaps_ms(quiet_s, begin_s)
                during += traffic.gaps_ms(begin_s, end_s)
                seconds.append(end_s - begin_s)
                planned += plan.moved_bytes
                moved += status.moved_bytes
            total.num_requests += traffic.num_requests
            total.num_failed += traffic.num_failed
            total.num_changed += traffic.num_changed
    params = model.params | {"shards": NUM_SHARDS, "streams": NUM_CLIENTS}
    if len(during) < 20:
        raise Unmeasurable(
            f"only {len(during)} tokens came while experts moved: nothing to move, or too slow a machine"
        )
    slower = _p99(during) / _p99(before)
    yield Row.of(NAME, params | {"what": "p99 between tokens, before"}, [_p99(before)], "ms")
    yield Row.of(NAME, params | {"what": "p99 between tokens, while experts move"}, [_p99(during)], "ms")
    yield Row.of(NAME, params | {"what": "p99 while they move, over before"}, [slower], "x")
    yield Row.of(NAME, params | {"what": "a rebalance takes"}, seconds, "s")
    yield Row.of(NAME, params | {"what": "moved, of planned"}, [100 * moved / planned], "%")
    counts = {"requests": total.num_requests, "failed": total.num_failed, "changed": total.num_changed}
    for what, count in counts.items():
        yield Row.of(NAME, params | {"what": what}, [count], "")


@contextmanager
def _traffic(address: str, seed: int, vocab_size: int) -> Iterator[Traffic]:
    span = max(2, (vocab_size - FIRST_TOKEN_ID) // (2 * NUM_CLIENTS))
    prompts = []
    for number in range(NUM_CLIENTS):
        first = FIRST_TOKEN_ID + ((seed * NUM_CLIENTS + number) * span) % (vocab_size - FIRST_TOKEN_ID - 2)
        prompts.append([first + place % 2 for place in range(PROMPT_TOKENS)])
    traffic = Traffic(prompts=prompts)
    clients = [threading.Thread(target=traffic.run_client, args=(address, n)) for n in range(NUM_CLIENTS)]
    for client in clients:
        client.start()
    try:
        yield traffic
    finally:
        traffic.stopping.set()
        for client in clients:
            client.join()


def _wait_until_idle(admin: AdminClient) -> admin_pb2.RebalanceStatus:
    give_up_s = time.monotonic() + TIMEOUT_S
    while (status := admin.status().rebalance).state != admin_pb2.REBALANCE_STATE_IDLE:
        if time.monotonic() > give_up_s:
            raise Unmeasurable(f"a rebalance took longer than {TIMEOUT_S:.0f} s: {status}")
        time.sleep(0.05)
    return status


def _p99(samples: list[float]) -> float:
    return statistics.quantiles(samples, n=100, method="inclusive")[-1]
