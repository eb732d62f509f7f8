"""What one client can hold and send at the gateway's port; raw HTTP/2 where stock clients are too polite."""

import socket
import struct
from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.rpc import MAX_CLIENT_MESSAGE_BYTES
from tests.fake_controller import gateway_host

TIMEOUT_S = 10.0
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS, PING, GOAWAY = 4, 6, 7
MAX_CONCURRENT_STREAMS, MAX_HEADER_LIST_SIZE = 3, 6
ENHANCE_YOUR_CALM = 11


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with gateway_host() as host:
        yield host.address


def frame(kind: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, 0]) + bytes(4) + payload


class RawConnection:
    """HTTP/2 frames by hand."""

    def __init__(self, address: str) -> None:
        host, _, port = address.partition(":")
        self._socket = socket.create_connection((host, int(port)), TIMEOUT_S)

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def frames(self) -> Iterator[tuple[int, bytes]]:
        """Until the other side closes."""
        while len(head := self._read(9)) == 9:
            yield head[3], self._read(int.from_bytes(head[:3], "big"))

    def _read(self, num_bytes: int) -> bytes:
        data = b""
        while len(data) < num_bytes:
            try:
                part = self._socket.recv(num_bytes - len(data))
            except ConnectionResetError:
                part = b""
            if not part:
                break
            data += part
        return data

    def close(self) -> None:
        self._socket.close()


def test_a_client_is_told_the_limits_of_streams_and_metadata(address: str) -> None:
    raw = RawConnection(address)
    raw.send(PREFACE + frame(SETTINGS))
    kind, payload = next(raw.frames())
    assert kind == SETTINGS
    settings = dict(struct.iter_unpack(">HI", payload))
    assert settings[MAX_CONCURRENT_STREAMS] == 1024
    assert settings[MAX_HEADER_LIST_SIZE] <= 32 * 1024
    raw.close()


def test_who_pings_without_rest_is_sent_away(address: str) -> None:
    raw = RawConnection(address)
    raw.send(PREFACE + frame(SETTINGS) + frame(PING, bytes(8)) * 20)
    goaways = [payload for kind, payload in raw.frames() if kind == GOAWAY]
    assert ENHANCE_YOUR_CALM in [int.from_bytes(payload[4:8], "big") for payload in goaways]
    raw.close()


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01" + bytes(64), PREFACE + b"\xff" * 64])
def test_bytes_that_are_no_call_end_their_connection_and_no_other(address: str, data: bytes) -> None:
    raw = RawConnection(address)
    raw.send(data)
    list(raw.frames())  # ends
    raw.close()
    assert_answers(address)


def test_metadata_over_the_limit_is_refused(address: str) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        ask_health(address, (("x-long", "x" * 40_000),))
    assert raised.value.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
    assert_answers(address)


def test_a_small_message_that_unpacks_to_a_large_one_is_refused(address: str) -> None:
    with grpc.insecure_channel(address, options=[("grpc.max_send_message_length", -1)]) as channel:
        call = channel.unary_stream("/mobula.v1.Inference/Generate")
        with pytest.raises(grpc.RpcError) as raised:
            list(call(bytes(8 * MAX_CLIENT_MESSAGE_BYTES), timeout=TIMEOUT_S, compression=grpc.Compression.Gzip))
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert_answers(address)


def ask_health(address: str, metadata: tuple[tuple[str, str], ...] = ()) -> None:
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S, metadata=metadata)


def assert_answers(address: str) -> None:
    ask_health(address)
