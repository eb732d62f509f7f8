"""A client that costs next to nothing: raw stubs, one thread, answers kept as bytes and read after the run.

Sends prompts of random tokens, ignores end tokens, and notes when each message came.
"""

import asyncio
import random
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import grpc.aio

from protos import generation_pb2 as pb
from protos import rpc
from tests.bench.row import Unmeasurable

T = TypeVar("T")

SERVICE = "/mobula.v1.Inference/"
CALL_TIMEOUT_S = 600.0
FIRST_TOKEN_ID = 10  # below are special tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """One answer. times_s: when each token came, on time.perf_counter; sent_s: when the request was sent."""

    sent_s: float
    times_s: tuple[float, ...]

    @property
    def first_token_s(self) -> float:
        """From the request to its first token."""
        return self.times_s[0] - self.sent_s


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRun:
    """Streams that ran together, and which experts were chosen while all of them decoded.

    choices: by mixture layer and expert, tokens that chose it.
    """

    streams: tuple[Stream, ...]
    choices: tuple[tuple[int, ...], ...]

    @property
    def tokens_per_s(self) -> float:
        return steady_rate(self.streams)


class LoadClient:
    """Calls one address. Not thread-safe. Methods raise Unmeasurable when a call fails."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._loop = asyncio.new_event_loop()
        self._channel: grpc.aio.Channel = self._loop.run_until_complete(self._connect())
        info = pb.GetModelInfoResponse.FromString(self._call(self._unary("GetModelInfo")))
        self.vocab_size: int = info.vocab_size
        self.max_model_len: int = info.max_model_len

    def close(self) -> None:
        self._loop.run_until_complete(self._channel.close())
        self._loop.close()

    def prefill(self, num_tokens: int, seed: int) -> float:
        """Seconds from the request to the first token of a prompt of so many tokens."""
        run = self._call(self._run_together([self._request(num_tokens, 1, seed)], counts_experts=False))
        return run.streams[0].first_token_s

    def decode(self, batch: int, context: int, num_tokens: int, seed: int, *, counts_experts: bool = True) -> DecodeRun:
        """`batch` prompts of `context` tokens at once, at least `num_tokens` steps with all of them decoding."""
        # While the last prompts are read, the first already decode.
        max_tokens = num_tokens + 2 + 2 * (batch * context // 1024)
        requests = [self._request(context, max_tokens, seed * 1000 + number) for number in range(batch)]
        return self._call(self._run_together(requests, counts_experts=counts_experts))

    def _request(self, num_tokens: int, max_tokens: int, seed: int) -> bytes:
        ids = random_prompt(num_tokens, self.vocab_size, seed)
        params = pb.SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids), sampling_params=params)
        return bytes(request.SerializeToString())

    async def _connect(self) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(self._address, options=rpc.client_options())

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        try:
            return self._loop.run_until_complete(coroutine)
        except grpc.aio.AioRpcError as error:
            raise Unmeasurable(f"the system answered {error.code().name}: {error.details()}") from error

    async def _unary(self, method: str) -> bytes:
        answer: bytes = await self._channel.unary_unary(SERVICE + method)(b"", timeout=CALL_TIMEOUT_S)
        return answer

    async def _run_together(self, requests: Sequence[bytes], *, counts_experts: bool) -> DecodeRun:
        call = self._channel.unary_stream(SERVICE + "Generate")
        num_waiting = len(requests)
        all_started = asyncio.Event()

        async def run(request: bytes) -> tuple[float, list[tuple[float, bytes]]]:
            nonlocal num_waiting
            messages: list[tuple[float, bytes]] = []
            sent_s = time.perf_counter()
            async for message in call(request, timeout=CALL_TIMEOUT_S):
                messages.append((time.perf_counter(), message))
                if len(messages) == 1:
                    num_waiting -= 1
                    if not num_waiting:
                        all_started.set()
            return sent_s, messages

        before = after = None
        tasks = [asyncio.create_task(run(request)) for request in requests]
        try:
            if counts_experts:
                first = asyncio.create_task(all_started.wait())
                await asyncio.wait([first, *tasks], return_when=asyncio.FIRST_COMPLETED)
                first.cancel()
                before = await self._unary("GetExpertLoad")
            answers = await asyncio.gather(*tasks)
            if counts_experts:
                after = await self._unary("GetExpertLoad")
        finally:  # one failed: the others are given up
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return DecodeRun(
            streams=tuple(_stream(sent_s, messages) for sent_s, messages in answers),
            choices=_choices(before, after) if before is not None and after is not None else (),
        )


def random_prompt(num_tokens: int, vocab_size: int, seed: int) -> list[int]:
    """Token ids, none of them special; the same for the same seed."""
    generator = random.Random(seed)
    return [generator.randrange(FIRST_TOKEN_ID, vocab_size) for _ in range(num_tokens)]


def steady_rate(streams: Sequence[Stream]) -> float:
    """Tokens/s of all streams together while every one of them was decoding.

    Counted from when the last stream had its first token until the first stream had its last one; for each stream
    between tokens of its own, so that a step that is only half delivered at either end does not matter.
    """
    begin = max(stream.times_s[0] for stream in streams)
    end = min(stream.times_s[-1] for stream in streams)
    rate = 0.0
    for stream in streams:
        times = [moment for moment in stream.times_s if begin <= moment <= end]
        if len(times) < 2 or times[-1] <= times[0]:
            raise Unmeasurable(
                f"{len(streams)} streams were never all decoding: the last began {begin - end:.2f} s after the first "
                "ended; more tokens are needed"
            )
        rate += (len(times) - 1) / (times[-1] - times[0])
    return rate


def _stream(sent_s: float, messages: Sequence[tuple[float, bytes]]) -> Stream:
    times: list[float] = []
    for moment, message in messages:
        times += [moment] * len(pb.GenerateResponse.FromString(message).token_ids)
    return Stream(sent_s=sent_s, times_s=tuple(times))


def _choices(before: bytes, after: bytes) -> tuple[tuple[int, ...], ...]:
    first, last = (pb.GetExpertLoadResponse.FromString(answer) for answer in (before, after))
    return tuple(
        tuple(late - early for early, late in zip(one.num_tokens, two.num_tokens, strict=True))
        for one, two in zip(first.layers, last.layers, strict=True)
    )
