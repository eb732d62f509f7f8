"""A TCP connection that a test can break or hold: what a gateway sees of a killed worker, or of a bad network."""

import asyncio

from protos.loop_thread import LoopThread

HOST = "127.0.0.1"


class CutLink:
    """Listens on a port of its own and passes bytes on to another one, until it is cut."""

    def __init__(self, target_port: int, loop: LoopThread) -> None:
        self._target_port = target_port
        self._loop = loop
        self._writers: list[asyncio.StreamWriter] = []
        self._flows = asyncio.Event()  # answers do
        self._flows.set()
        self._server = loop.run(asyncio.start_server(self._accept, HOST, 0))
        self.port = int(self._server.sockets[0].getsockname()[1])

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"

    def cut(self) -> None:
        """Breaks every connection; new ones are refused."""
        self._loop.run(self._cut())

    def release(self) -> None:
        """What `hold` has kept back comes, and what follows."""
        self._loop.run(self._release())

    async def hold(self) -> None:
        """On the loop: keeps every answer back, and the connections open."""
        self._flows.clear()

    async def _release(self) -> None:
        self._flows.set()

    async def _cut(self) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            target_reader, target_writer = await asyncio.open_connection(HOST, self._target_port)
        except ConnectionError:
            writer.transport.abort()
            return
        self._writers += [writer, target_writer]
        if not self._server.is_serving():  # cut while it was opened
            await self._cut()
        passes = asyncio.Event()
        passes.set()
        await asyncio.gather(_pass_on(reader, target_writer, passes), _pass_on(target_reader, writer, self._flows))


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, flows: asyncio.Event) -> None:
    try:
        while data := await reader.read(65536):
            await flows.wait()
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass  # it was cut
    finally:
        writer.close()
