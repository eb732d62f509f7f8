"""Concurrent clients that stream answers all the time, and what each of them saw.

Every request is one of a few cases, greedy or seeded, so that its tokens are known once it was answered undisturbed.
For the same reason a client whose connection to the gateway breaks asks for the rest; an error that the system itself
answers stands.
Knows nothing of faults.
"""

import asyncio
import itertools
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import grpc
import grpc.aio

from cluster.client_access import ClientAccess
from protos import generation_pb2, generation_pb2_grpc, rpc
from protos.loop_thread import LoopThread

PROMPTS = (
    "def main():",
    "class Handler:\n    def __init__(self, name):\n        ",
    "The following example shows how to",
    "typedef struct {\n    ",
)
REQUEST_TIMEOUT_S = 45.0  # a client's patience: longer than any fault may last
PAUSE_S = 0.2  # of a client whose request failed
BROKEN = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
)  # of a connection that ends, and of a server that does


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A request whose answer is always the same."""

    text: str
    temperature: float
    seed: int
    max_tokens: int

    def request(self, received: Sequence[int]) -> generation_pb2.GenerateRequest:
        """As it is sent by a client that has these tokens."""
        params = generation_pb2.SamplingParams(
            temperature=self.temperature, top_p=0.95, seed=self.seed, max_tokens=self.max_tokens, ignore_eos=True
        )
        return generation_pb2.GenerateRequest(text=self.text, sampling_params=params, received_token_ids=received)


@dataclass(slots=True, kw_only=True)
class Answer:
    """What a client saw of one request. Moments are of time.monotonic().

    Attributes:
        times_s: when each token came.
        ended_s: None while it streams.
        error: the status that it ended with; "" when it was answered.
        num_repeats: how often it was asked again because the connection to the gateway broke.
    """

    case: Case
    sent_s: float
    times_s: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    ended_s: float | None = None
    error: str = ""
    num_repeats: int = 0


def cases(max_tokens: int) -> list[Case]:
    """Of every prompt one that is greedy and one that is drawn by seed."""
    return [
        Case(text=text, temperature=temperature, seed=number, max_tokens=max_tokens)
        for number, text in enumerate(PROMPTS)
        for temperature in (0.0, 0.8)
    ]


class Load:
    """`num_clients` clients, each with one request after the other, from `start` to `drain`.

    answers: in the order in which they were sent. Written by the load's own thread; others may read what has ended.
    """

    def __init__(self, address: str, access: ClientAccess, cases: Sequence[Case], num_clients: int, seed: int) -> None:
        self.answers: list[Answer] = []
        self._address = address
        self._access = access
        self._cases = cases
        self._num_clients = num_clients
        self._choices = _each_once_then_random(cases, random.Random(seed))
        self._is_draining = False
        self._loop = LoopThread("chaos-load")
        self._clients: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Returns at once."""
        self._loop.run(self._start())

    def drain(self, timeout_s: float) -> None:
        """Sends nothing new, waits for what is under way, and gives up what takes longer."""
        self._loop.run(self._drain(timeout_s))

    def close(self) -> None:
        """Cuts off what is under way."""
        self.drain(0.0)
        self._loop.stop()

    def is_streaming(self) -> bool:
        """Whether every client has had a token."""
        first = self.answers[: self._num_clients]
        return len(first) == self._num_clients and all(answer.times_s for answer in first)

    def has_answered_every_case(self) -> bool:
        """Whether the tokens of each are known."""
        return {answer.case for answer in self.answers if answer.ended_s and not answer.error} == set(self._cases)

    async def _start(self) -> None:
        self._clients = [asyncio.create_task(self._client()) for _ in range(self._num_clients)]

    async def _drain(self, timeout_s: float) -> None:
        self._is_draining = True
        clients, self._clients = self._clients, []
        if not clients:
            return
        _, late = await asyncio.wait(clients, timeout=timeout_s)
        for client in late:
            client.cancel()
        for outcome in await asyncio.gather(*clients, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome

    async def _client(self) -> None:
        # Of its own, as a client of its own has: with several gateways not all go to one.
        options = [
            *rpc.client_options(),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.initial_reconnect_backoff_ms", 100),
        ]
        async with self._access.aio_channel(self._address, options) as channel:
            stub = generation_pb2_grpc.InferenceStub(channel)
            while not self._is_draining:
                answer = await self._ask(stub, next(self._choices))
                await asyncio.sleep(PAUSE_S if answer.error else 0.0)

    async def _ask(self, stub: generation_pb2_grpc.InferenceStub, case: Case) -> Answer:
        answer = Answer(case=case, sent_s=time.monotonic())
        self.answers.append(answer)
        try:
            while await self._is_cut_off(stub, answer):
                await asyncio.sleep(PAUSE_S if answer.num_repeats else 0.0)
                answer.num_repeats += 1
        except asyncio.CancelledError:
            answer.error = "not answered when the run ended"
            raise
        finally:
            answer.ended_s = time.monotonic()
        return answer

    async def _is_cut_off(self, stub: generation_pb2_grpc.InferenceStub, answer: Answer) -> bool:
        """One call; whether the connection broke under it, so that the client asks for the rest."""
        patience_s = answer.sent_s + REQUEST_TIMEOUT_S - time.monotonic()
        # Waits for a gateway that is not there yet, as the deadline allows.
        call = stub.Generate(
            answer.case.request(answer.token_ids),
            timeout=patience_s,
            wait_for_ready=True,
            metadata=self._access.metadata,
        )
        try:
            async for message in call:
                answer.times_s += [time.monotonic()] * len(message.token_ids)
                answer.token_ids += message.token_ids
        except grpc.aio.AioRpcError as error:
            if error.code() in BROKEN and not _was_answered(error):
                return len(answer.token_ids) < answer.case.max_tokens
            answer.error = f"{error.code().name}: {error.details()}"
        return False


def _was_answered(error: grpc.aio.AioRpcError) -> bool:
    """Whether the system itself ended the call so, rather than the connection to it."""
    return any(key == "grpc-status-details-bin" for key, _ in error.trailing_metadata() or ())


def _each_once_then_random(cases: Sequence[Case], rng: random.Random) -> Iterator[Case]:
    return itertools.chain(cases, (rng.choice(cases) for _ in itertools.count()))
