"""A frame that is sent again, as it was, is refused: on the stream that it came on, and on a ring."""

from collections.abc import Iterator

import grpc
import grpc.aio
import pytest

from experts.servicer import SERVICE
from protos import expert_pb2, ring
from protos.codec import decode_frame
from tests.fake_experts import expert_shard, grouped_gate, placed, small_model
from tests.frames import encode_frame
from tests.shard_host import Host, running_host


@pytest.fixture
def host() -> Iterator[Host]:
    with running_host() as host:
        yield host


def header(number: int) -> expert_pb2.ForwardHeader:
    return expert_pb2.ForwardHeader(sequence_number=number, layer_id=1, placement_version=1, dtype=1)


@pytest.mark.parametrize("then", [7, 6])
def test_a_frame_that_was_answered_ends_the_stream_when_it_comes_again(
    host: Host, then: int, caplog: pytest.LogCaptureFixture
) -> None:
    shard = expert_shard(placed(grouped_gate(), 1), 0, small_model())
    server = host.serve(shard)
    shard.start()

    async def replay() -> None:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            call = channel.stream_stream(f"/{SERVICE}/Forward")()
            await call.write(encode_frame(header(7), []))
            answer, _ = decode_frame(expert_pb2.ForwardResult, await call.read())
            assert answer.sequence_number == 7
            await call.write(encode_frame(header(then), []))
            await call.read()

    with pytest.raises(grpc.aio.AioRpcError, match=f"forward {then} comes after forward 7") as raised:
        host.thread.run(replay(), 30)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "the stream of ipv4:127.0.0.1" in caplog.text
    shard.stop()


def test_a_doorbell_that_was_answered_ends_the_ring_when_it_comes_again(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    shard = expert_shard(placed(grouped_gate(), 1), 0, small_model())
    server = host.serve(shard)
    shard.start()
    sock, _ = ring.connect(server.ring.ticket, 4096)
    sock.settimeout(30)
    doorbell = ring.pack_forward(header(7).SerializeToString(), ring.Region(0, 0), ring.Region(0, 0))
    sock.send(doorbell)
    assert expert_pb2.ForwardResult.FromString(sock.recv(4096)).sequence_number == 7
    sock.send(doorbell)
    assert sock.recv(4096) == b""
    assert "ring is ended: forward 7 comes after forward 7" in caplog.text
    sock.close()
    shard.stop()
