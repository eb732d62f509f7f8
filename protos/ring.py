"""The ring between a worker and a shard of one host: shared memory, and a socket that says what lies where in it.

The worker owns the memory and decides where everything lies; the shard reads requests and writes answers in place. The
memory is anonymous (memfd) and the socket abstract, so neither leaves anything behind, whoever dies.

1. The shard gives the worker a ticket in the Forward stream's initial metadata: its socket's name and a secret. Where
   the socket cannot be reached (another host, another network namespace, another user) the stream carries the data.
   Names of abstract sockets are no secret, so only who was told the ticket, over the stream and after its certificate
   was checked, gets a ring.
2. The worker connects and sends hello, with the secret and the memory's descriptor; the shard checks them and answers
   welcome.
3. A forward's doorbell: where its payload lies, where its answer belongs, and a ForwardHeader. The answer's doorbell is
   a ForwardResult. Doorbells are at most MAX_DOORBELL_BYTES.
4. The end of the socket is the end of the ring.
"""

import fcntl
import hmac
import mmap
import os
import secrets
import socket
import struct
from contextlib import suppress
from typing import NamedTuple

from protos.errors import InvalidRequest

METADATA_KEY = "mobula-ring"
MAX_DOORBELL_BYTES = 4096
HANDSHAKE_TIMEOUT_S = 2.0

SECRET_BYTES = 16
_HELLO = struct.Struct(f"<8sQ{SECRET_BYTES}s")  # magic, bytes of memory, the ticket's secret
_MAGIC = b"mobring2"
_WELCOME = b"welcome1"
_FORWARD = struct.Struct("<4Q")  # offset and bytes of the payload, of the answer
ALIGNMENT = 64  # of regions: a cache line, and the widest vector load
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
# A memory that its maker could shrink would kill the reader with SIGBUS.
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class RingRefused(Exception):
    """The peer, its memory or what it says is not what a ring may be built on."""


class Region(NamedTuple):
    """A part of the memory."""

    offset: int
    num_bytes: int


class Ticket(NamedTuple):
    """What lets a worker connect to a shard's ring."""

    socket_name: str  # of an abstract socket
    secret: bytes

    @classmethod
    def random(cls) -> "Ticket":
        """One that nobody else has."""
        return cls(f"mobula-{secrets.token_hex(16)}", secrets.token_bytes(SECRET_BYTES))

    @classmethod
    def from_text(cls, text: str) -> "Ticket":
        """The ticket that a shard told. Raises RingRefused when it is none."""
        socket_name, _, secret = text.partition(":")
        try:
            return cls(socket_name, bytes.fromhex(secret))
        except ValueError as error:
            raise RingRefused(f"the shard told a ticket of {len(text)} characters that is none") from error

    def to_text(self) -> str:
        """For metadata. Not to be logged."""
        return f"{self.socket_name}:{self.secret.hex()}"


def listen(name: str) -> socket.socket:
    """The shard's socket; gone when it is closed."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f"\0{name}")
    listener.listen()
    return listener


def connect(ticket: Ticket, num_bytes: int) -> tuple[socket.socket, memoryview]:
    """The worker's side of the handshake: the socket, not blocking, and new zeroed memory that both now share.

    Memory is taken from the machine page by page as it is first used. Raises OSError when the socket cannot be reached
    or the machine has no such memory, RingRefused when its owner is another user or does not welcome us.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.settimeout(HANDSHAKE_TIMEOUT_S)
        sock.connect(f"\0{ticket.socket_name}")
        check_peer(sock, os.getuid())
        fd = os.memfd_create("mobula-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, num_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            memory = memoryview(mmap.mmap(fd, num_bytes))
            socket.send_fds(sock, [_HELLO.pack(_MAGIC, num_bytes, ticket.secret)], [fd])
        finally:
            os.close(fd)
        _check_welcome(sock.recv(MAX_DOORBELL_BYTES))
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock, memory


def accept(sock: socket.socket, uid: int, secret: bytes) -> memoryview:
    """The shard's side of the handshake on an accepted connection; the memory to share. Sets it not blocking.

    uid, secret: what the worker must run as and know.

    Raises OSError or RingRefused; the caller closes the socket.
    """
    check_peer(sock, uid)
    sock.settimeout(HANDSHAKE_TIMEOUT_S)
    hello, fds, _, _ = socket.recv_fds(sock, _HELLO.size + 1, 1, socket.MSG_CMSG_CLOEXEC)
    try:
        if len(hello) != _HELLO.size or len(fds) != 1:
            raise RingRefused(f"hello has {len(hello)} bytes and {len(fds)} descriptors, expected {_HELLO.size} and 1")
        magic, num_bytes, told = _HELLO.unpack(hello)
        if magic != _MAGIC:
            raise RingRefused(f"hello begins with {magic!r}, expected {_MAGIC!r}")
        if not hmac.compare_digest(told, secret):
            raise RingRefused("hello has not the secret that workers are told over their stream")
        memory = _map(fds[0], num_bytes)
    finally:
        for fd in fds:
            os.close(fd)
    sock.sendall(_WELCOME)
    sock.setblocking(False)
    return memory


def check_peer(sock: socket.socket, uid: int) -> None:
    """Raises RingRefused unless the process at the other end runs as `uid`: abstract names have no permissions."""
    _, peer_uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    if peer_uid != uid:
        raise RingRefused(f"the other end runs as uid {peer_uid}, only uid {uid} may share memory")


def _check_welcome(answer: bytes) -> None:
    if answer != _WELCOME:
        raise RingRefused(f"the shard answered hello with {answer!r}")


def _map(fd: int, num_bytes: int) -> memoryview:
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise RingRefused(f"the descriptor is not of a memory that can be sealed: {error}") from error
    if seals & fcntl.F_SEAL_SHRINK == 0:
        raise RingRefused(f"the memory may shrink: seals are {seals:#x}")
    size = os.fstat(fd).st_size
    if not 0 < num_bytes <= size:
        raise RingRefused(f"hello promises {num_bytes} bytes, the memory has {size}")
    try:
        return memoryview(mmap.mmap(fd, num_bytes))
    except (OSError, ValueError, OverflowError) as error:
        raise RingRefused(f"the memory cannot be mapped: {error}") from error


def shut_down(sock: socket.socket) -> None:
    """Ends the connection for both ends; may be called from any thread, and again. The socket's owner closes it."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def pack_forward(header: bytes, payload: Region, answer: Region) -> bytes:
    """A forward's doorbell; `header` is a serialised ForwardHeader."""
    return _FORWARD.pack(*payload, *answer) + header


def unpack_forward(doorbell: bytes, memory_bytes: int) -> tuple[bytes, Region, Region]:
    """Header, payload and answer of a forward's doorbell. Raises InvalidRequest when they do not lie in the memory."""
    if not _FORWARD.size <= len(doorbell) < MAX_DOORBELL_BYTES:
        raise InvalidRequest(
            f"a doorbell of {len(doorbell)} bytes, expected {_FORWARD.size} to {MAX_DOORBELL_BYTES - 1}"
        )
    payload_offset, payload_bytes, answer_offset, answer_bytes = _FORWARD.unpack_from(doorbell)
    is_inside = payload_offset + payload_bytes <= memory_bytes and answer_offset + answer_bytes <= memory_bytes
    if not is_inside or payload_offset % ALIGNMENT or answer_offset % ALIGNMENT:
        raise InvalidRequest(
            f"payload of {payload_bytes} bytes at {payload_offset} and answer of {answer_bytes} at {answer_offset} "
            f"do not lie at multiples of {ALIGNMENT} within {memory_bytes} bytes"
        )
    return doorbell[_FORWARD.size :], Region(payload_offset, payload_bytes), Region(answer_offset, answer_bytes)
