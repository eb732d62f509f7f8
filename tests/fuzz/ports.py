"""Every port of a running system: calls with hostile messages, and bytes that are no call at all.

The system is that of tests/system.py, one process without Ray, with a controller's admin server beside it. After the
cases it must answer as before, idle, without a descriptor or thread more.
"""

import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import grpc
import psutil
from google.protobuf.message import Message
from hypothesis import strategies as st

from cluster.controller.admin_server import AdminServer
from protos import admin_pb2, expert_pb2, generation_pb2, ring, worker_pb2
from tests.checkpoints import write_checkpoint
from tests.fake_controller import FakeController
from tests.fuzz.hostile import almost, messages
from tests.fuzz.target import Target
from tests.system import HOST, System

CALL_S = 4.0
MAX_MESSAGES = 2  # of a stream that is answered; then it is cancelled
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SPARE = (2, 8)  # descriptors, threads: of bounded pools that had not grown to their size before
PAGES = ("/", "/metrics", "/metrics/own", "/sd", "/api/state", "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "*")
SETTLE_S = 20.0  # for connections to be closed and requests to end after the cases
REFUSALS = (
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.CANCELLED,
)


class Method(NamedTuple):
    """Of a service that is fed. listener: who is called."""

    path: str
    request: type[Message]
    listener: str
    is_answer_stream: bool = False
    is_request_stream: bool = False


METHODS = (
    Method("/mobula.v1.Inference/Generate", generation_pb2.GenerateRequest, "gateway", is_answer_stream=True),
    Method("/mobula.v1.Inference/Tokenize", generation_pb2.TokenizeRequest, "gateway"),
    Method("/mobula.v1.Inference/GetModelInfo", generation_pb2.GetModelInfoRequest, "gateway"),
    Method("/mobula.v1.Inference/GetExpertLoad", generation_pb2.GetExpertLoadRequest, "gateway"),
    Method("/mobula.v1.Inference/GetPlacement", generation_pb2.GetPlacementRequest, "gateway"),
    Method("/mobula.v1.Admin/GetStatus", admin_pb2.GetStatusRequest, "gateway"),
    Method("/mobula.v1.Admin/Rebalance", admin_pb2.RebalanceRequest, "gateway"),
    Method("/mobula.v1.Worker/Generate", worker_pb2.RelayedRequest, "worker", is_answer_stream=True),
    Method("/mobula.v1.Admin/Rebalance", admin_pb2.RebalanceRequest, "controller"),
    Method("/mobula.v1.ExpertShard/GetShardLoad", expert_pb2.GetShardLoadRequest, "shard"),
    Method(
        "/mobula.v1.ExpertShard/Forward",
        expert_pb2.ForwardRequest,
        "shard",
        is_answer_stream=True,
        is_request_stream=True,
    ),
)


def targets() -> list[Target]:
    """Calls, bytes on every port, bytes on the ring's socket."""
    calls = st.sampled_from(METHODS).flatmap(lambda method: st.tuples(st.just(method), _payloads(method)))
    places = st.integers(0, 31)
    return [
        Target(name="calls", share=24, cases=calls, open=_callers),
        Target(name="bytes", share=12, cases=st.tuples(places, _bytes()), open=_raw),
        Target(name="ring", share=4, cases=st.tuples(st.integers(0, 2), _hellos()), open=_ring),
    ]


def _payloads(method: Method) -> st.SearchStrategy[bytes]:
    sensible = messages(method.request.DESCRIPTOR).map(lambda message: message.SerializeToString())
    return st.one_of(sensible, sensible.flatmap(almost), st.binary(max_size=32))


def _bytes() -> st.SearchStrategy[bytes]:
    """HTTP/2 with something wrong, HTTP/1, noise."""
    kinds, flags = st.integers(0, 12), st.integers(0, 255)
    streams, lengths = st.sampled_from((0, 1, 2, 3, 2**31 - 1)), st.one_of(st.none(), st.integers(0, 2**24 - 1))
    frames = st.lists(st.builds(_http2_frame, kinds, flags, streams, st.binary(max_size=48), lengths), max_size=6)
    http2 = frames.map(lambda frames: PREFACE + _http2_frame(4, 0, 0, b"", None) + b"".join(frames))
    http1 = st.sampled_from(PAGES).flatmap(
        lambda page: almost(f"GET {page} HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello".encode())
    )
    return st.one_of(http2, http2.flatmap(almost), http1, st.binary(max_size=256))


def _http2_frame(kind: int, flags: int, stream: int, payload: bytes, length: int | None) -> bytes:
    return (
        struct.pack(">I", len(payload) if length is None else length)[1:]
        + bytes((kind, flags))
        + struct.pack(">I", stream)
        + payload
    )


def _hellos() -> st.SearchStrategy[bytes]:
    return st.one_of(almost(struct.pack("<8sQ16s", b"mobring2", 4096, bytes(16))), st.binary(max_size=64))


class Ports:
    """The system under fire. addresses: host:port of every listener, by name."""

    def __init__(self, folder: Path) -> None:
        self.system = System(write_checkpoint(folder, "v2", num_hidden_layers=2), expert_shards={"num_threads": 1})
        self.admin = AdminServer(FakeController())
        self.addresses: dict[str, str] = {}
        self.expected: list[int] = []

    def __enter__(self) -> "Ports":
        self.system.__enter__()
        self.addresses["controller"] = self.admin.start(HOST)
        gateway = self.system.gateway
        gateway.update_members({0: self.system.workers[0].health().address}, {}, self.addresses["controller"])
        for name, role in zip(("gateway", "worker", "shard"), self.system.roles, strict=True):
            self.addresses |= {name: role.health().address, f"{name}'s metrics": role.health().metrics_address}
        self.expected = self.system.greedy([5, 6, 7], 4)
        return self

    def __exit__(self, *exception: object) -> None:
        self.admin.stop()
        self.system.__exit__(None, None, None)

    @contextmanager
    def unharmed(self) -> Iterator[None]:
        """Nothing is left of what is done in the block."""
        before = self._held()
        yield
        assert self.system.greedy([5, 6, 7], 4) == self.expected
        assert self.system.becomes_idle()
        give_up_s = time.monotonic() + SETTLE_S
        while any(now > then + spare for now, then, spare in zip(self._held(), before, SPARE, strict=True)):
            assert time.monotonic() < give_up_s, f"descriptors and threads were {before}, are {self._held()}"
            time.sleep(0.1)

    @staticmethod
    def _held() -> tuple[int, int]:
        process = psutil.Process()
        return process.num_fds(), process.num_threads()


@contextmanager
def _ports() -> Iterator[Ports]:
    with TemporaryDirectory(prefix="mobula-fuzz-") as folder, Ports(Path(folder)) as ports:
        yield ports


@contextmanager
def _callers() -> Iterator[Callable[[tuple[Method, bytes]], None]]:
    with _ports() as ports:
        channels = {name: grpc.insecure_channel(ports.addresses[name]) for name in {m.listener for m in METHODS}}

        @cache
        def callable_of(method: Method) -> Callable[..., Any]:
            channel = channels[method.listener]
            kinds = {
                (False, False): channel.unary_unary,
                (False, True): channel.unary_stream,
                (True, True): channel.stream_stream,
            }
            return kinds[method.is_request_stream, method.is_answer_stream](method.path)

        def take(case: tuple[Method, bytes]) -> None:
            method, payload = case
            code, details = _outcome(callable_of(method), method, payload)
            assert code in REFUSALS, f"{method.path}: {code.name}: {details}"

        for method in METHODS:  # connections and the library's threads are there before they are counted
            take((method, b"\xff"))
        with ports.unharmed():
            yield take
        for channel in channels.values():
            channel.close()


def _outcome(call: Callable[..., Any], method: Method, payload: bytes) -> tuple[grpc.StatusCode, str]:
    """How a call ended, or that it was cancelled because enough was heard."""
    try:
        answer = call(iter([payload]) if method.is_request_stream else payload, timeout=CALL_S)
        if method.is_answer_stream:
            for number, _ in enumerate(answer, start=1):
                if number == MAX_MESSAGES:
                    answer.cancel()
                    break
    except grpc.RpcError as error:
        return error.code(), error.details()
    return grpc.StatusCode.OK, ""


@contextmanager
def _raw() -> Iterator[Callable[[tuple[int, bytes]], None]]:
    with _ports() as ports:
        addresses = [address.rpartition(":") for address in ports.addresses.values()]

        def take(case: tuple[int, bytes]) -> None:
            number, data = case
            host, _, port = addresses[number % len(addresses)]
            with socket.create_connection((host, int(port)), CALL_S) as connection, suppress(ConnectionError):
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                connection.settimeout(0.001)
                with suppress(TimeoutError):
                    connection.recv(64)

        for number in range(len(addresses)):
            take((number, b"x"))
        with ports.unharmed():
            yield take


@contextmanager
def _ring() -> Iterator[Callable[[tuple[int, bytes]], None]]:
    """Case: the memory that is handed over (none, one that may shrink, a file) and what is said."""
    with _ports() as ports:
        server = ports.system.shards[0]._server
        assert server
        name = server.ring.ticket.socket_name

        def take(case: tuple[int, bytes]) -> None:
            kind, hello = case
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with sock, suppress(ConnectionError), open("/dev/null" if kind == 1 else __file__, "rb") as file:
                sock.settimeout(CALL_S)
                sock.connect(f"\0{name}")
                if hello:
                    socket.send_fds(sock, [hello], [] if kind == 0 else [file.fileno()])
                sock.shutdown(socket.SHUT_WR)
                assert sock.recv(64) == b"", "a ring was given to who does not know the secret"

        take((0, ring._MAGIC))
        with ports.unharmed():
            yield take
