"""Clients against a gateway whose answers are known: the case's number of tokens, all its seed."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import grpc
import grpc.aio

from cluster.chaos.load import Case, Load, cases
from cluster.client_access import ClientAccess
from protos import generation_pb2
from protos.loop_thread import LoopThread


class Gateway:
    """Hangs after the first token when told to."""

    def __init__(self) -> None:
        self.loop = LoopThread("gateway")
        self.hangs = False
        self.port = self.loop.run(self._start())

    async def _start(self) -> int:
        self._server = grpc.aio.server()
        method = grpc.unary_stream_rpc_method_handler(self._generate, generation_pb2.GenerateRequest.FromString)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("mobula.v1.Inference", {"Generate": method}),)
        )
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return port

    async def _generate(self, request: generation_pb2.GenerateRequest, context: object) -> AsyncIterator[bytes]:
        for _ in range(request.sampling_params.max_tokens):
            yield generation_pb2.GenerateResponse(token_ids=[request.sampling_params.seed]).SerializeToString()
            await asyncio.sleep(60.0 if self.hangs else 0.001)

    def close(self) -> None:
        self.loop.run(self._server.stop(None))
        self.loop.stop()


@contextmanager
def running_load(num_clients: int = 3) -> Iterator[tuple[Load, Gateway]]:
    gateway = Gateway()
    load = Load(f"127.0.0.1:{gateway.port}", ClientAccess(), cases(max_tokens=4), num_clients, seed=0)
    load.start()
    try:
        yield load, gateway
    finally:
        load.close()
        gateway.close()


def wait_until_every_case_is_answered(load: Load) -> None:
    give_up_s = time.monotonic() + 20.0
    while not load.has_answered_every_case():
        assert time.monotonic() < give_up_s
        time.sleep(0.01)


def test_every_case_is_sent_and_its_answer_kept() -> None:
    with running_load() as (load, _):
        wait_until_every_case_is_answered(load)
        assert load.is_streaming()
        load.drain(20.0)
    assert {answer.case for answer in load.answers} == set(cases(max_tokens=4))
    for answer in load.answers:
        assert answer.token_ids == [answer.case.seed] * 4
        assert len(answer.times_s) == 4
        assert answer.sent_s < answer.times_s[0] <= answer.times_s[-1] <= (answer.ended_s or 0.0)


def test_what_hangs_at_the_end_has_failed() -> None:
    with running_load() as (load, gateway):
        wait_until_every_case_is_answered(load)
        gateway.hangs = True
        time.sleep(0.2)
        load.drain(0.1)
        late = [answer for answer in load.answers if answer.error]
        assert len(late) == 3
        assert all(answer.ended_s for answer in late)


def test_a_gateway_that_is_gone_is_waited_for() -> None:
    with running_load() as (load, gateway):
        wait_until_every_case_is_answered(load)
        gateway.loop.run(gateway._server.stop(None))
        time.sleep(0.5)
        broken = [answer for answer in load.answers if answer.error]
        assert len(broken) == 3, "those under way fail, later ones wait"
        load.drain(0.1)


def test_cases_differ() -> None:
    assert len(set(cases(max_tokens=4))) == len(cases(max_tokens=4)) == 8
    assert isinstance(cases(max_tokens=4)[0], Case)
