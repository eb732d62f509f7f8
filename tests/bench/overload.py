"""Overload: what is answered in time when clients ask for as much as the system can do, and for five times that.

Requests arrive whether others are answered or not. One that is refused is not sent again: its client was told when to.
"""

import asyncio
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import psutil

from cluster.client import AdminClient
from protos import generation_pb2 as pb
from protos import generation_pb2_grpc
from tests.bench.load_client import FIRST_TOKEN_ID
from tests.bench.measured_model import MeasuredModel, measured_models
from tests.bench.row import Options, Row, Unmeasurable

NAME = "overload"
NUM_SHARDS, MAX_NUM_SEQS = 2, 8
PROMPT_TOKENS, NEW_TOKENS = 16, 32
DEADLINE_S = 10.0  # of a request: an answer after that is worth nothing
SECONDS = 20.0  # of arrivals
FACTOR = 5
SETTINGS: dict[str, Any] = {
    "num_shards": NUM_SHARDS,
    "attention_workers": {"engine": {"max_num_seqs": MAX_NUM_SEQS}},
    "gateway": {"admission": {"max_wait_s": 2.0}},
}


@dataclass(slots=True)
class Outcome:
    """Of a phase. first_token_s: of requests that were answered in time."""

    num_answered: int = 0
    num_refused: int = 0
    num_late: int = 0
    seconds: float = 0.0
    first_token_s: list[float] = field(default_factory=list)

    @property
    def per_s(self) -> float:
        """Requests answered in time."""
        return self.num_answered / self.seconds

    @property
    def num_requests(self) -> int:
        return self.num_answered + self.num_refused + self.num_late


def rows(options: Options) -> Iterator[Row]:
    """By model: goodput at one and at five times the capacity."""
    for model in measured_models(options, options.formats[:1]):
        if not isinstance(model, MeasuredModel):
            name, kind, why = model
            yield Row.missing(NAME, {"model": name, "format": kind}, why)
            continue
        try:
            options.check_time(4 * SECONDS)
            with model.served(options, **SETTINGS) as (system, client):
                yield from _measure(model, system.address, client.vocab_size, options)
        except (Unmeasurable, grpc.RpcError) as error:
            yield Row.missing(NAME, model.params, str(error))


def _measure(model: MeasuredModel, address: str, vocab_size: int, options: Options) -> Iterator[Row]:
    params = model.params | {"shards": NUM_SHARDS, "streams": MAX_NUM_SEQS}
    load = _Load(address, vocab_size)
    options.show(f"{model.name}: capacity")
    capacity = asyncio.run(load.closed(MAX_NUM_SEQS, SECONDS / 2)).per_s
    outcomes, grown_mib = {}, {}
    for factor in (1, FACTOR):
        options.show(f"{model.name}: {factor} times the capacity")
        before = _gateway_mib(address)
        outcomes[factor] = asyncio.run(load.open(factor * capacity, SECONDS))
        grown_mib[factor] = _gateway_mib(address) - before
    one, five = outcomes[1], outcomes[FACTOR]
    if not one.num_answered:
        raise Unmeasurable("nothing was answered in time: too slow a machine")
    yield Row.of(NAME, params | {"what": "capacity"}, [capacity], "req/s")
    for factor, outcome in outcomes.items():
        p99 = statistics.quantiles(outcome.first_token_s, n=100, method="inclusive")[-1]
        at = params | {"load": f"{factor}x"}
        yield Row.of(NAME, at | {"what": "asked"}, [outcome.num_requests / SECONDS], "req/s")
        yield Row.of(NAME, at | {"what": "answered in time"}, [outcome.per_s], "req/s")
        yield Row.of(NAME, at | {"what": "refused at once"}, [100 * outcome.num_refused / outcome.num_requests], "%")
        yield Row.of(NAME, at | {"what": "late or failed"}, [outcome.num_late], "")
        yield Row.of(NAME, at | {"what": "p99 first token"}, [1e3 * p99], "ms")
        yield Row.of(NAME, at | {"what": "gateway's memory grew"}, [grown_mib[factor]], "MiB")
    yield Row.of(NAME, params | {"what": f"answered at {FACTOR}x, over 1x"}, [five.per_s / one.per_s], "x")


class _Load:
    """Requests of one client."""

    def __init__(self, address: str, vocab_size: int) -> None:
        self._address = address
        self._vocab_size = vocab_size
        self._rng = random.Random(1)

    async def closed(self, num_streams: int, seconds: float) -> Outcome:
        """Each stream sends its next request when the one before has ended."""
        return await self._phase(seconds, [self._stream] * num_streams)

    async def open(self, per_s: float, seconds: float) -> Outcome:
        """Poisson arrivals."""

        async def arrivals(stub: generation_pb2_grpc.InferenceStub, outcome: Outcome, end_s: float) -> None:
            async with asyncio.TaskGroup() as group:
                next_s = time.monotonic()
                while next_s < end_s:
                    await asyncio.sleep(max(0.0, next_s - time.monotonic()))
                    group.create_task(self._request(stub, outcome))
                    next_s += self._rng.expovariate(per_s)  # also where this process was late

        return await self._phase(seconds, [arrivals])

    async def _phase(self, seconds: float, sources: list[Any]) -> Outcome:
        outcome, begin_s = Outcome(), time.monotonic()
        async with grpc.aio.insecure_channel(self._address) as channel:
            stub = generation_pb2_grpc.InferenceStub(channel)
            await asyncio.gather(*(source(stub, outcome, begin_s + seconds) for source in sources))
        outcome.seconds = time.monotonic() - begin_s
        return outcome

    async def _stream(self, stub: generation_pb2_grpc.InferenceStub, outcome: Outcome, end_s: float) -> None:
        while time.monotonic() < end_s:
            await self._request(stub, outcome)

    async def _request(self, stub: generation_pb2_grpc.InferenceStub, outcome: Outcome) -> None:
        ids = [self._rng.randrange(FIRST_TOKEN_ID, self._vocab_size) for _ in range(PROMPT_TOKENS)]
        params = pb.SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids), sampling_params=params)
        begin_s = time.monotonic()
        first_s = None
        try:
            async for _ in stub.Generate(request, timeout=DEADLINE_S):
                first_s = first_s or time.monotonic() - begin_s
        except grpc.aio.AioRpcError as error:
            is_refused = error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            outcome.num_refused += is_refused
            outcome.num_late += not is_refused
            return
        outcome.num_answered += 1
        outcome.first_token_s.append(first_s or 0.0)


def _gateway_mib(address: str) -> float:
    """Resident memory of the gateways, which run on this machine."""
    with AdminClient(address) as admin:
        pids = [process.pid for process in admin.status().processes if process.name.startswith("gateway")]
    return sum(psutil.Process(pid).memory_info().rss for pid in pids) / 2**20
