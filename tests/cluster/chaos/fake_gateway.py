"""A gateway whose answers are known: the case's number of tokens, all its seed, less what the client has."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import grpc.aio

from protos import generation_pb2
from protos.loop_thread import LoopThread


class Gateway:
    """Hangs after the first token while told to; gives other tokens while told to."""

    def __init__(self) -> None:
        self.loop = LoopThread("gateway")
        self.hangs = False
        self.lies = False
        self.port = self.loop.run(self._start(0))

    async def _start(self, port: int) -> int:
        self._server = grpc.aio.server()
        method = grpc.unary_stream_rpc_method_handler(self._generate, generation_pb2.GenerateRequest.FromString)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("mobula.v1.Inference", {"Generate": method}),)
        )
        bound = self._server.add_insecure_port(f"127.0.0.1:{port}")
        await self._server.start()
        return bound

    async def _generate(self, request: generation_pb2.GenerateRequest, context: object) -> AsyncIterator[bytes]:
        for position in range(len(request.received_token_ids), request.sampling_params.max_tokens):
            token_id = request.sampling_params.seed + self.lies
            yield generation_pb2.GenerateResponse(token_ids=[token_id]).SerializeToString()
            if position + 1 < request.sampling_params.max_tokens:  # who has all tokens is not kept waiting for one
                await asyncio.sleep(0.001)
                while self.hangs:
                    await asyncio.sleep(0.01)

    def close(self) -> None:
        self.loop.run(self._server.stop(None))
        self.loop.stop()
