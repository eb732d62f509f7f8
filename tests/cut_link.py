"""A TCP connection that a test can break: what a gateway sees of a worker that is killed."""

import asyncio

from protos.loop_thread import LoopThread

HOST = "127.0.0.1"


class CutLink:
    """Listens on a port of its own and passes bytes on to another one, until it is cut."""

    def __init__(self, target_port: int, loop: LoopThread) -> None:
        self._target_port = target_port
        self._loop = loop
        self._writers: list[asyncio.StreamWriter] = []
        self._server = loop.run(asyncio.start_server(self._accept, HOST, 0))
        self.port = int(self._server.sockets[0].getsockname()[1])

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"

    def cut(self) -> None:
        """Breaks every connection; new ones are refused."""
        self._loop.run(self._cut())

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
        await asyncio.gather(_pass_on(reader, target_writer), _pass_on(target_reader, writer))


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass  # it was cut
    finally:
        writer.close()
