"""Who may share memory with a shard: its own user's processes that were told the ticket over a stream."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from experts.ring_server import RingServer
from protos import ring
from tests.fake_experts import expert_shard, grouped_gate, placed, small_model


@pytest.fixture
def ring_server() -> Iterator[RingServer]:
    shard = expert_shard(placed(grouped_gate(), 1), 0, small_model())
    server = RingServer(shard)
    shard.start()
    yield server
    server.close()
    shard.stop()


def test_another_user_is_refused(ring_server: RingServer) -> None:
    refusing = RingServer(ring_server._shard, uid=os.getuid() + 1)
    with pytest.raises((ring.RingRefused, OSError)):
        ring.connect(refusing.ticket, 4096)
    assert refusing.num_connections == 0
    refusing.close()


STRANGER_PROCESS = """
import os, socket, sys
os.setuid(65534)
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.connect("\\0" + sys.argv[1])
try:
    print(sock.recv(99) or "nothing")
except ConnectionResetError:
    print("nothing")
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can run a process as somebody else")
def test_a_process_of_another_user_is_refused_by_both_ends(ring_server: RingServer) -> None:
    command = [sys.executable, "-c", STRANGER_PROCESS, ring_server.ticket.socket_name]
    stranger = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert stranger.stdout.split() == ["nothing"]
    assert ring_server.num_connections == 0
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ends[0], ends[1], pytest.raises(ring.RingRefused, match=r"uid 0, only uid 1 may"):
        ring.check_peer(ends[0], uid=1)


def test_who_found_the_socket_but_was_not_told_the_secret_is_refused(
    ring_server: RingServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Names of abstract sockets stand in /proc/net/unix for everybody to read."""
    ticket = ring_server.ticket
    with open("/proc/net/unix", encoding="ascii") as sockets:
        assert ticket.socket_name in sockets.read()
    for secret in (b"", bytes(ring.SECRET_BYTES), ticket.secret[:-1] + b"\0"):
        if secret != ticket.secret:
            with pytest.raises((ring.RingRefused, OSError)):
                ring.connect(ring.Ticket(ticket.socket_name, secret), 4096)
    assert ring_server.num_connections == 0
    assert "has not the secret" in caplog.text
    assert ticket.secret.hex() not in caplog.text
    sock, _ = ring.connect(ring.Ticket.from_text(ticket.to_text()), 4096)
    sock.close()


@pytest.mark.parametrize("text", ["", "name", "name:zz", "name:" + "0" * 31])
def test_a_ticket_that_is_none_is_refused(text: str) -> None:
    with pytest.raises((ring.RingRefused, OSError)):
        ring.connect(ring.Ticket.from_text(text), 4096)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can run a process as somebody else")
def test_memory_cannot_be_opened_by_another_user(ring_server: RingServer) -> None:
    sock, memory = ring.connect(ring_server.ticket, 4096)
    assert len(memory) == 4096
    read = (
        "import os, sys; os.setuid(65534)\n"
        "folder = f'/proc/{sys.argv[1]}/map_files'\n"
        "try: os.listdir(folder); open(f'/proc/{sys.argv[1]}/mem', 'rb')\n"
        "except PermissionError: print('refused')"
    )
    command = [sys.executable, "-c", read, str(os.getpid())]
    assert subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split() == ["refused"]
    sock.close()
