"""A gateway before workers whose answers are known, with links that can be cut."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import grpc.aio

from cluster.config import GatewayConfig
from cluster.gateway.gateway import SERVICE, Gateway
from cluster.gateway.metrics import GatewayMetrics
from cluster.gateway.worker_pool import WORKER
from protos import errors, generation_pb2, generation_pb2_grpc, rpc, worker_pb2
from protos.loop_thread import LoopThread
from tests.cut_link import CutLink

HOST = "127.0.0.1"
NUM_PROMPT_TOKENS = 3  # of every request, as workers say


class FakeWorker:
    """Answers with its rank; fails with `error` if that is set; streams for ever if the prompt is "endless".

    A prompt "count to N" is answered with the tokens 0 to N - 1 that are missing; the link to the worker is cut after
    `num_until_cut` of them, and brings no answer after `num_until_held`, though the worker goes on.
    """

    def __init__(self, dp_rank: int, loop: LoopThread) -> None:
        self.dp_rank = dp_rank
        self.error: errors.MobulaError | None = None
        self.num_until_cut: int | None = None
        self.num_until_held: int | None = None
        self.relayed: list[worker_pb2.RelayedRequest] = []
        self.num_calls = 0
        self.num_running = 0
        self.max_num_seqs = 0  # that it says it computes at once; 0: says nothing
        self._loop = loop
        self.link = CutLink(loop.run(self._start()), loop)

    async def _start(self) -> int:
        self._server = grpc.aio.server()
        handlers = {
            "GetExpertLoad": rpc.unary_handler(self.get_expert_load),
            "GetModelInfo": rpc.unary_handler(self.get_model_info),
        }
        worker_handlers = {"Generate": rpc.stream_handler(self.generate)}
        self._server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(SERVICE, handlers),
                grpc.method_handlers_generic_handler(WORKER, worker_handlers),
            )
        )
        port = self._server.add_insecure_port(f"{HOST}:0")
        await self._server.start()
        return port

    def stop(self) -> None:
        self.link.cut()
        self._loop.run(self._server.stop(None))

    async def generate(self, request: bytes, context: grpc.aio.ServicerContext) -> AsyncGenerator[bytes, None]:
        self.num_calls += 1
        if self.error:
            raise self.error
        self.relayed.append(worker_pb2.RelayedRequest.FromString(request))
        message = generation_pb2.GenerateRequest.FromString(self.relayed[-1].request)
        self.num_running += 1
        try:
            if message.text.startswith("count to "):
                num_received = len(message.received_token_ids)
                start = num_received + len(self.relayed[-1].output_token_ids)
                async for response in self._count(start, int(message.text[9:]), num_received):
                    yield response
                return
            yield generation_pb2.GenerateResponse(text=str(self.dp_rank)).SerializeToString()
            while message.text == "flood":
                yield generation_pb2.GenerateResponse(text="." * 10_000).SerializeToString()
            while message.text == "endless":
                await asyncio.sleep(0.01)
                yield generation_pb2.GenerateResponse(text=".").SerializeToString()
        finally:
            self.num_running -= 1

    async def _count(self, start: int, stop: int, num_received: int) -> AsyncGenerator[bytes, None]:
        for token_id in range(start, stop):
            await self._cut_after(token_id - start)
            answer = generation_pb2.GenerateResponse(text=f"{token_id} ", token_ids=[token_id])
            if token_id == stop - 1:
                answer.finish_reason = generation_pb2.FINISH_REASON_LENGTH
                answer.usage.MergeFrom(
                    generation_pb2.Usage(
                        num_prompt_tokens=NUM_PROMPT_TOKENS,
                        num_completion_tokens=stop,
                        num_received_tokens=num_received,
                    )
                )
            yield answer.SerializeToString()
        await self._cut_after(stop - start)

    async def _cut_after(self, num_answers: int) -> None:
        if num_answers == self.num_until_held:
            await asyncio.sleep(0.05)
            await self.link.hold()
        if num_answers == self.num_until_cut:
            await asyncio.sleep(0.05)  # what was written is on its way
            await self.link._cut()
            await asyncio.sleep(60.0)

    async def get_expert_load(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        response = generation_pb2.GetExpertLoadResponse()
        response.layers.add(layer_id=1, num_tokens=[4, 2])
        response.dispatch.num_tokens_by_ranks.extend([0] + [self.dp_rank + 1] * (self.dp_rank + 1))
        response.dispatch.sent_bytes = 100
        response.dispatch.num_dropped_assignments = 3
        return response.SerializeToString()

    async def get_model_info(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        return generation_pb2.GetModelInfoResponse(
            model_id=str(self.dp_rank), max_num_seqs=self.max_num_seqs
        ).SerializeToString()


class Front:
    """A gateway with workers behind it."""

    def __init__(self, loop: LoopThread, num_workers: int = 2, **settings: Any) -> None:
        """settings: of GatewayConfig."""
        self.workers = [FakeWorker(rank, loop) for rank in range(num_workers)]
        self._loop = loop
        self.metrics = GatewayMetrics()

        async def start() -> tuple[Gateway, int]:
            gateway = Gateway(GatewayConfig(**settings), self.metrics)
            return gateway, await gateway.start(HOST, 0)

        self.gateway, self.port = loop.run(start())
        self.address = f"{HOST}:{self.port}"
        self.channel = grpc.insecure_channel(self.address)
        self.stub = generation_pb2_grpc.InferenceStub(self.channel)

    def connect(self) -> None:
        addresses = {worker.dp_rank: worker.link.address for worker in self.workers}
        self._loop.run(self.gateway.update_workers(addresses))

    def disconnect(self) -> None:
        self._loop.run(self.gateway.update_workers({}))

    def generate(self, text: str = "x") -> Iterator[generation_pb2.GenerateResponse]:
        return self.stub.Generate(generation_pb2.GenerateRequest(text=text), timeout=10.0)

    def close(self) -> None:
        self.channel.close()
        self._loop.run(self.gateway.stop(0.0))
        for worker in self.workers:
            worker.stop()


@contextmanager
def front(**settings: Any) -> Iterator[Front]:
    loop = LoopThread("test")
    opened = Front(loop, **settings)
    opened.connect()
    try:
        yield opened
    finally:
        opened.close()
        loop.stop()
