"""A stream of forwards whose peer, shard and network are plain objects."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from experts.servicer import MAX_UNWRITTEN_ANSWERS, ExpertServicer
from protos import expert_pb2
from protos.errors import QueueFull
from tests.frames import encode_frame

NUM_FORWARDS = 2 * MAX_UNWRITTEN_ANSWERS


class RefusingShard:
    """Answers every forward at once."""

    def submit(self, header: expert_pb2.ForwardHeader, payload: Any, on_done: Any) -> None:
        on_done(QueueFull("9 wait"))


class Peer:
    """Sends forwards as fast as they are taken, and reads answers only when it is told to; a stream's context too."""

    def __init__(self) -> None:
        self.num_taken = 0
        self.num_read = 0
        self.reads = asyncio.Event()

    async def forwards(self) -> AsyncIterator[bytes]:
        for number in range(1, NUM_FORWARDS + 1):
            yield encode_frame(expert_pb2.ForwardHeader(sequence_number=number), ())
            self.num_taken += 1

    async def send_initial_metadata(self, metadata: Any) -> None:
        """Nothing to do."""

    async def write(self, frame: bytes) -> None:
        await self.reads.wait()
        self.num_read += 1


def test_a_worker_that_reads_no_answers_is_not_read_from_until_it_does() -> None:
    async def serve() -> None:
        peer: Any = Peer()
        servicer = ExpertServicer(RefusingShard())  # type: ignore[arg-type]
        stream = asyncio.create_task(servicer.forward(peer.forwards(), peer))
        for _ in range(10 * NUM_FORWARDS):
            await asyncio.sleep(0)
        assert peer.num_taken < MAX_UNWRITTEN_ANSWERS
        peer.reads.set()
        await stream
        assert (peer.num_taken, peer.num_read) == (NUM_FORWARDS, NUM_FORWARDS)

    asyncio.run(serve())
