"""Bare streams of grpc.aio that send bytes to and fro: the floor of a forward over gRPC.

"/bench/Echo" is answered by the event loop itself, and called by the thread that runs its loop. "/bench/Relay" wakes
the threads that a forward wakes: the caller's asks an event loop to send and is woken by it, and the server's loop asks
a thread for the answer. Nothing else happens in either.
"""

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable

import grpc
import grpc.aio

from protos import rpc
from protos.loop_thread import LoopThread
from protos.poller import Poller

ECHO_METHOD, RELAY_METHOD = "/bench/Echo", "/bench/Relay"
TIMEOUT_S = 60.0

Call = Callable[[], float]  # one round trip, in seconds


async def start_echo() -> tuple[grpc.aio.Server, int]:
    """A server of both methods and its port."""
    handlers = {"Echo": _echo, "Relay": _Relay().serve}
    server = grpc.aio.server(options=rpc.frame_options())
    methods = {name: grpc.stream_stream_rpc_method_handler(handler) for name, handler in handlers.items()}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, port


def echo_call(address: str, frame: bytes) -> Call:
    """In a loop of its own that this thread runs."""
    loop = asyncio.new_event_loop()

    async def round_trip() -> float:
        started_s = time.perf_counter()
        await stream.write(frame)
        await stream.read()
        return time.perf_counter() - started_s

    stream = loop.run_until_complete(_connect(address, ECHO_METHOD))
    return lambda: loop.run_until_complete(round_trip())


def relay_call(address: str, frame: bytes, loop: LoopThread) -> Call:
    """From this thread, which sleeps in a poller meanwhile, through the given loop."""
    poller = Poller()
    answers: list[bytes] = []

    async def start_stream() -> tuple["asyncio.Queue[bytes]", list["asyncio.Task[None]"]]:
        stream = await _connect(address, RELAY_METHOD)
        outgoing: asyncio.Queue[bytes] = asyncio.Queue()
        return outgoing, [asyncio.create_task(write(stream, outgoing)), asyncio.create_task(read(stream))]

    async def write(stream: grpc.aio.StreamStreamCall, outgoing: "asyncio.Queue[bytes]") -> None:
        while True:
            await stream.write(await outgoing.get())

    async def read(stream: grpc.aio.StreamStreamCall) -> None:
        async for answer in stream:
            answers.append(answer)
            poller.wake()

    outgoing, tasks = loop.run(start_stream())

    def call() -> float:
        started_s = time.perf_counter()
        loop.loop.call_soon_threadsafe(outgoing.put_nowait, frame)
        while not answers:
            assert not any(task.done() for task in tasks), "the stream has ended"
            poller.poll(TIMEOUT_S)
        elapsed_s = time.perf_counter() - started_s
        answers.clear()
        return elapsed_s

    return call


async def _connect(address: str, method: str) -> grpc.aio.StreamStreamCall:
    return grpc.aio.insecure_channel(address, options=rpc.frame_options()).stream_stream(method)()


async def _echo(request_iterator: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
    async for frame in request_iterator:
        await context.write(frame)


class _Relay:
    """Answers from a thread of its own, as a shard does."""

    def __init__(self) -> None:
        self._asked: queue.SimpleQueue[tuple[Callable[[bytes], object], bytes]] = queue.SimpleQueue()
        threading.Thread(target=self._answer, name="relay", daemon=True).start()

    def _answer(self) -> None:
        while True:
            answer, frame = self._asked.get()
            answer(frame)

    async def serve(self, request_iterator: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        loop = asyncio.get_running_loop()
        ready: asyncio.Queue[bytes] = asyncio.Queue()
        writer = asyncio.create_task(self._write(context, ready))
        async for frame in request_iterator:
            self._asked.put((lambda answer: loop.call_soon_threadsafe(ready.put_nowait, answer), frame))
        writer.cancel()

    async def _write(self, context: grpc.aio.ServicerContext, ready: "asyncio.Queue[bytes]") -> None:
        while True:
            await context.write(await ready.get())
