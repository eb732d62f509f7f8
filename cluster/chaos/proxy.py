"""A proxy that gRPC's connections of a deployment go through, so that links can be cut, held and delayed without root.

gRPC takes the way through it by itself when `grpc_proxy` is in a process's environment: it sends "CONNECT host:port",
then its bytes (HTTP/1.1, RFC 9110 section 9.3.6). So the proxy knows which port a connection leads to, nothing else.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from protos.loop_thread import LoopThread

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
CHUNK_BYTES = 65536
REPEAT_S = 0.2  # until TCP sends a lost segment again, at least
MAX_HELD_BYTES = 4 * 2**20  # of one direction on its way; then the sender waits
HEAD_S = 5.0  # for the CONNECT line


@dataclass(frozen=True, slots=True, kw_only=True)
class Weather:
    """What happens to a connection's bytes. TCP repeats what is lost, so losses are delays, and nothing is left out.

    Attributes:
        is_cut: connections end, new ones are refused.
        holds_requests, holds_answers: bytes of this direction wait until the weather changes.
        delay_s: that every chunk takes longer; loss: share of chunks that are sent again after REPEAT_S.
        spoil: what becomes of a chunk of answers.
    """

    is_cut: bool = False
    holds_requests: bool = False
    holds_answers: bool = False
    delay_s: float = 0.0
    loss: float = 0.0
    spoil: Callable[[bytes], bytes] | None = None


CALM = Weather()


class LinkProxy:
    """Listens from the start. Everything but the methods runs on its loop."""

    def __init__(self, seed: int = 0, port: int = 0) -> None:
        """port: to listen on, of loopback; 0 takes a free one."""
        self._loop = LoopThread("chaos-proxy")
        self._rng = random.Random(seed)
        self._weather: dict[int, Weather] = {}
        self._elsewhere = CALM
        self._changed = asyncio.Event()
        self._links: set[tuple[int, asyncio.StreamWriter]] = set()
        self._running: set[asyncio.Task[None]] = set()
        self._server = self._loop.run(asyncio.start_server(self._accept, HOST, port))

    @property
    def url(self) -> str:
        """For `grpc_proxy`."""
        return f"http://{HOST}:{self._server.sockets[0].getsockname()[1]}"

    def set_weather(self, ports: Iterable[int] | None, weather: Weather) -> None:
        """Of all connections to these ports, those that are open and those to come. None: of those to all others."""
        self._loop.run(self._set_weather(None if ports is None else set(ports), weather))

    def close(self) -> None:
        """Ends every connection."""
        self._loop.run(self._end())
        self._loop.stop()

    async def _set_weather(self, ports: set[int] | None, weather: Weather) -> None:
        if ports is None:
            self._elsewhere = weather
        else:
            self._weather |= dict.fromkeys(ports, weather)
        self._changed.set()
        self._changed = asyncio.Event()
        for port, writer in list(self._links):
            if self._of(port).is_cut:
                writer.transport.abort()

    async def _end(self) -> None:
        self._server.close()
        for direction in self._running:
            direction.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        await asyncio.sleep(0)  # for what waited for them

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = await self._open(reader)
        if link is None:  # the caller sees its connection end
            writer.close()
            return
        port, target_reader, target_writer = link
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        ends = {(port, writer), (port, target_writer)}
        directions = [
            asyncio.create_task(self._pass_on(reader, target_writer, port, is_answer=False)),
            asyncio.create_task(self._pass_on(target_reader, writer, port, is_answer=True)),
        ]
        self._links |= ends
        self._running.update(directions)
        try:
            await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._links -= ends
            self._running.difference_update(directions)
            for direction in directions:
                direction.cancel()
            writer.close()
            target_writer.close()

    async def _open(
        self, reader: asyncio.StreamReader
    ) -> tuple[int, asyncio.StreamReader, asyncio.StreamWriter] | None:
        """The connection that a caller asks for; None where it asks for none, nobody listens or the link is cut."""
        try:
            host, port = await asyncio.wait_for(_target(reader), HEAD_S)
            if self._of(port).is_cut:
                return None
            return port, *await asyncio.open_connection(host, port)
        except (OSError, ValueError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            return None

    async def _pass_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int, *, is_answer: bool
    ) -> None:
        """One direction, until either end ends it."""
        chunks: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(MAX_HELD_BYTES // CHUNK_BYTES)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._deliver(chunks, writer, port, is_answer=is_answer))
                group.create_task(self._receive(chunks, reader, port, is_answer=is_answer))
        except* OSError as error:  # an end is gone: so is the connection
            logger.debug("a link to port %d has ended: %s", port, error)

    async def _receive(
        self, chunks: "asyncio.Queue[tuple[float, bytes]]", reader: asyncio.StreamReader, port: int, *, is_answer: bool
    ) -> None:
        clock = asyncio.get_running_loop().time
        while data := await reader.read(CHUNK_BYTES):
            weather = self._of(port)
            wait_s = weather.delay_s + (REPEAT_S if self._rng.random() < weather.loss else 0.0)
            if is_answer and weather.spoil is not None:
                data = weather.spoil(data)
            await chunks.put((clock() + wait_s, data))
        await chunks.put((clock(), b""))

    async def _deliver(
        self, chunks: "asyncio.Queue[tuple[float, bytes]]", writer: asyncio.StreamWriter, port: int, *, is_answer: bool
    ) -> None:
        """In order, each when its time has come and nothing holds it."""
        clock = asyncio.get_running_loop().time
        while True:
            due_s, data = await chunks.get()
            await asyncio.sleep(max(0.0, due_s - clock()))
            while self._is_held(port, is_answer=is_answer):
                await self._changed.wait()
            if not data:
                return
            writer.write(data)
            await writer.drain()

    def _is_held(self, port: int, *, is_answer: bool) -> bool:
        weather = self._of(port)
        return weather.holds_answers if is_answer else weather.holds_requests

    def _of(self, port: int) -> Weather:
        return self._weather.get(port, self._elsewhere)


async def _target(reader: asyncio.StreamReader) -> tuple[str, int]:
    """The host and port that a client asks for. Raises ValueError for anything but CONNECT."""
    line, *_ = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
    method, target, _ = line.split(b" ")
    if method != b"CONNECT":
        raise ValueError("not CONNECT")
    host, _, port = target.decode("ascii").rpartition(":")
    return host.strip("[]"), int(port)
