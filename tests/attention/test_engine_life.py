import threading
import time

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
