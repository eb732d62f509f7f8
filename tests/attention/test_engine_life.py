import socket
import threading
import time

from protos.poller import Poller
from router.ring_transport import Ring
from tests.attention.fake_decoder import CountingDecoder, Listener, make_engine, make_sequence


def test_an_engine_gives_signs_of_life_while_it_waits_and_none_while_it_hangs_or_is_idle() -> None:
    decoder, limits, entered, may_go = CountingDecoder(), [], threading.Event(), threading.Event()

    def hang(token_ids):
        entered.set()
        assert may_go.wait(30)

    decoder.before_forward = hang
    engine = make_engine(decoder, limit_step=limits.append)
    assert engine.signs_of_life is None
    engine.start()
    engine.submit(make_sequence([1], name="request", max_tokens=1), Listener())
    assert entered.wait(30)
    before = engine.signs_of_life
    assert before is not None
    assert engine.signs_of_life == before
    limits[0].on_progress()
    assert engine.signs_of_life == before + 1
    may_go.set()
    while engine.signs_of_life is not None:
        time.sleep(0.001)
    engine.stop()


class UnregisteringPoller(Poller):
    """Says when somebody has left."""

    def __init__(self) -> None:
        super().__init__()
        self.was_unregistered = threading.Event()

    def unregister(self, fd: int) -> None:
        super().unregister(fd)
        self.was_unregistered.set()


def test_an_idle_engine_closes_a_ring_that_ended() -> None:
    shard, worker = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    worker.setblocking(False)
    poller = UnregisteringPoller()
    ring = Ring("shard:1", worker, memoryview(bytearray(4096)), poller)
    engine = make_engine(poller=poller)
    engine.start()
    with shard:
        ring.shut_down()
        assert poller.was_unregistered.wait(30)
    engine.stop()
    assert not ring.is_open
    assert worker.fileno() == -1


def test_an_idle_engine_takes_what_is_submitted_and_stops_when_it_is_told_to() -> None:
    engine = make_engine()
    engine.start()
    for _ in range(3):
        was_told = threading.Event()
        engine.submit(make_sequence(name="request", max_tokens=1), lambda _, was_told=was_told: was_told.set())
        assert was_told.wait(30)
    engine.stop()
    assert not engine.is_alive
