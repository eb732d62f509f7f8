import itertools
import threading
from concurrent.futures import Future

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.batcher import Batcher, ForwardOutput, WaitingForward
from experts.grouped_ffn import ForwardInput
from experts.weight_store import LayerWeights
from protos.errors import Cancelled, DeadlineExceeded, InternalError, QueueFull, Unavailable


def layer(layer_id: int) -> LayerWeights:
    return LayerWeights(placement_version=1, layer_id=layer_id, experts={}, expert_to_unit=np.zeros(1, dtype=np.int64))


LAYERS = {layer_id: layer(layer_id) for layer_id in range(4)}


def forward_of(value: float, num_partial_sums: int = 1) -> ForwardInput:
    return ForwardInput(
        hidden_states=torch.full((num_partial_sums, 1), value),
        assignment_bytes=b"",
        num_partial_sums=num_partial_sums,
    )


def submit(batcher: Batcher, weights: LayerWeights, forward: ForwardInput, out=None) -> Future:
    """A future of the forward's output; cancelling it gives the forward up."""
    future = Future()

    def on_done(outcome) -> None:
        if not future.cancelled():
            (future.set_exception if isinstance(outcome, Exception) else future.set_result)(outcome)

    waiting = WaitingForward(weights=weights, forward=forward, on_done=on_done, out=out)
    future.add_done_callback(lambda future: setattr(waiting, "is_given_up", future.cancelled()))
    batcher.submit(waiting)
    return future


class Recorder:
    """Computes "ten times the row" and remembers what was merged."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, list[float]]] = []
        self.error: Exception | None = None

    def __call__(self, batch: list[WaitingForward]) -> torch.Tensor:
        if self.error is not None:
            raise self.error
        rows = torch.cat([waiting.forward.hidden_states for waiting in batch])
        self.batches.append((batch[0].weights.layer_id, rows.flatten().tolist()))
        return rows * 10


def test_everything_that_waits_for_the_oldest_forwards_layer_is_computed_at_once():
    compute = Recorder()
    batcher = Batcher(compute, max_waiting=10, max_waiting_bytes=2**20)
    submitted = [(2, 1.0), (1, 2.0), (2, 3.0), (3, 4.0), (1, 5.0)]
    futures = [submit(batcher, LAYERS[layer_id], forward_of(value)) for layer_id, value in submitted]
    assert [batcher.compute_next() for _ in range(4)] == [2, 2, 1, 0]
    assert compute.batches == [(2, [1.0, 3.0]), (1, [2.0, 5.0]), (3, [4.0])]
    assert [future.result().partial_sums.item() for future in futures] == [10.0, 20.0, 30.0, 40.0, 50.0]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=20))
@settings(max_examples=50)
def test_every_forward_gets_its_own_partial_sums(work):
    batcher = Batcher(Recorder(), max_waiting=20, max_waiting_bytes=2**20)
    futures = [
        submit(batcher, LAYERS[layer_id], forward_of(float(index), num_partial_sums))
        for index, (layer_id, num_partial_sums) in enumerate(work)
    ]
    while batcher.compute_next():
        pass
    for index, (future, (_, num_partial_sums)) in enumerate(zip(futures, work, strict=True)):
        assert future.result().partial_sums.flatten().tolist() == [10.0 * index] * num_partial_sums


def test_versions_of_a_layer_are_not_mixed():
    compute = Recorder()
    batcher = Batcher(compute, max_waiting=10, max_waiting_bytes=2**20)
    for weights in (LAYERS[1], layer(1), LAYERS[1]):
        submit(batcher, weights, forward_of(1.0))
    assert [batcher.compute_next(), batcher.compute_next()] == [2, 1]


def test_a_full_queue_refuses_with_the_limit_and_takes_again_when_there_is_room():
    batcher = Batcher(Recorder(), max_waiting=2, max_waiting_bytes=2**20)
    for _ in range(2):
        submit(batcher, LAYERS[0], forward_of(1.0))
    with pytest.raises(QueueFull, match="2 forwards wait, limit is 2"):
        submit(batcher, LAYERS[0], forward_of(1.0))
    batcher.compute_next()
    submit(batcher, LAYERS[0], forward_of(1.0))


def test_a_cancelled_forward_is_never_computed():
    compute = Recorder()
    batcher = Batcher(compute, max_waiting=10, max_waiting_bytes=2**20)
    gone, stays = (submit(batcher, LAYERS[0], forward_of(value)) for value in (1.0, 2.0))
    gone.cancel()
    batcher.compute_next()
    assert compute.batches == [(0, [2.0])]
    assert stays.result().partial_sums.item() == 20.0


def test_a_forward_that_was_given_up_or_waited_too_long_is_answered_with_why_and_not_computed():
    now_ns = 0
    compute = Recorder()
    batcher = Batcher(compute, max_waiting=10, max_waiting_bytes=2**20, clock_ns=lambda: now_ns)
    outcomes = []

    def waiting(**fields) -> WaitingForward:
        return WaitingForward(weights=LAYERS[0], forward=forward_of(1.0), on_done=outcomes.append, **fields)

    given_up, late, in_time = waiting(), waiting(timeout_ns=4_000), waiting(timeout_ns=6_000)
    for forward in (given_up, late, in_time):
        batcher.submit(forward)
    given_up.is_given_up = True
    now_ns = 5_000
    batcher.compute_next()
    assert [type(outcome) for outcome in outcomes] == [Cancelled, DeadlineExceeded, ForwardOutput]
    assert compute.batches == [(0, [1.0])]


def test_forwards_that_wait_may_keep_so_many_bytes():
    batcher = Batcher(Recorder(), max_waiting=10, max_waiting_bytes=100)
    forward = WaitingForward(weights=LAYERS[0], forward=forward_of(1.0), on_done=lambda _: None, num_bytes=101)
    batcher.submit(forward)
    with pytest.raises(QueueFull, match="forwards with 101 bytes wait, limit is 100"):
        batcher.submit(forward)


def test_a_computation_that_fails_fails_its_forwards_and_the_next_one_works():
    compute = Recorder()
    batcher = Batcher(compute, max_waiting=10, max_waiting_bytes=2**20)
    compute.error = RuntimeError("out of memory")
    failed = submit(batcher, LAYERS[0], forward_of(1.0))
    batcher.compute_next()
    with pytest.raises(InternalError, match="layer 0 failed: out of memory"):
        failed.result()
    compute.error = None
    works = submit(batcher, LAYERS[0], forward_of(1.0))
    batcher.compute_next()
    assert works.result().partial_sums.item() == 10.0


def test_queue_time_is_from_arrival_until_the_computation_begins():
    times = iter([100, 250, 400])
    batcher = Batcher(Recorder(), max_waiting=10, max_waiting_bytes=2**20, clock_ns=lambda: next(times))
    future = submit(batcher, LAYERS[0], forward_of(1.0))
    batcher.compute_next()
    assert (future.result().queue_ns, future.result().compute_ns) == (150, 150)


def test_a_forward_that_arrives_while_a_computation_begins_has_waited_for_no_negative_time():
    times, futures = itertools.count(100), []

    def clock_ns() -> int:
        now_ns = next(times)
        if now_ns == 101:  # between the look at the clock and at the queue
            futures.append(submit(batcher, LAYERS[0], forward_of(2.0)))
        return now_ns

    batcher = Batcher(Recorder(), max_waiting=10, max_waiting_bytes=2**20, clock_ns=clock_ns)
    futures.append(submit(batcher, LAYERS[0], forward_of(1.0)))
    while batcher.compute_next():
        pass
    assert len(futures) == 2
    assert all(future.result().queue_ns >= 0 for future in futures)


def test_a_forward_whose_answer_cannot_be_given_is_told_an_error():
    told = []

    def on_done(outcome) -> None:
        told.append(outcome)
        if len(told) == 1:
            raise ValueError("out of range")

    batcher = Batcher(Recorder(), max_waiting=10, max_waiting_bytes=2**20)
    batcher.submit(WaitingForward(weights=LAYERS[2], forward=forward_of(1.0), on_done=on_done))
    assert batcher.compute_next() == 1
    assert isinstance(told[1], InternalError)
    assert str(told[1]) == "a forward of layer 2 could not be answered: out of range"


def test_stopping_computes_what_waits_and_refuses_what_comes():
    release, started = threading.Event(), threading.Event()
    compute = Recorder()

    def slow(batch):
        started.set()
        assert release.wait(30)
        return compute(batch)

    batcher = Batcher(slow, max_waiting=10, max_waiting_bytes=2**20)
    batcher.start()
    first = submit(batcher, LAYERS[0], forward_of(1.0))
    assert started.wait(30)
    second = submit(batcher, LAYERS[1], forward_of(2.0))
    stopping = threading.Thread(target=batcher.stop)
    stopping.start()
    release.set()
    stopping.join(30)
    assert [first.result(0).partial_sums.item(), second.result(0).partial_sums.item()] == [10.0, 20.0]
    with pytest.raises(Unavailable, match="draining"):
        submit(batcher, LAYERS[0], forward_of(1.0))


def test_partial_sums_are_written_where_the_forward_wants_them_alone_or_merged():
    batcher = Batcher(Recorder(), max_waiting=10, max_waiting_bytes=2**20)
    outs = [torch.zeros(2, 1) for _ in range(3)]
    futures = [submit(batcher, LAYERS[0], forward_of(1.0, 2), outs[0])]
    batcher.compute_next()
    futures += [
        submit(batcher, LAYERS[0], forward_of(value, 2), out) for value, out in ((2.0, outs[1]), (3.0, outs[2]))
    ]
    assert batcher.compute_next() == 2
    assert [out.flatten().tolist() for out in outs] == [[10.0, 10.0], [20.0, 20.0], [30.0, 30.0]]
    assert all(future.result().partial_sums is out for future, out in zip(futures, outs, strict=True))


def test_a_forward_is_answered_before_it_is_counted_and_nobody_sees_it_uncounted():
    events: list[str] = []
    counting, asked = threading.Lock(), threading.Event()

    def read_counts() -> None:
        asked.set()
        with counting:
            events.append(f"read after {events[-1]}")

    def answered(_: Future) -> None:
        reader.start()
        assert asked.wait(30)
        events.append("answered")

    reader = threading.Thread(target=read_counts)
    batcher = Batcher(
        Recorder(),
        max_waiting=10,
        max_waiting_bytes=2**20,
        count=lambda *_: events.append("counted"),
        counting=counting,
    )
    submit(batcher, LAYERS[0], forward_of(1.0)).add_done_callback(answered)
    batcher.compute_next()
    reader.join(30)
    assert events == ["answered", "counted", "read after counted"]


def test_a_count_that_fails_holds_nobody_up():
    def fail(*_) -> None:
        raise ZeroDivisionError

    counting = threading.Lock()
    batcher = Batcher(Recorder(), max_waiting=10, max_waiting_bytes=2**20, count=fail, counting=counting)
    future = submit(batcher, LAYERS[0], forward_of(1.0))
    with pytest.raises(ZeroDivisionError):
        batcher.compute_next()
    assert future.result(0).partial_sums.item() == 10.0
    assert not counting.locked()


def test_a_thread_that_computes_gives_no_sign_of_life_while_it_hangs_and_is_idle_when_nothing_waits():
    entered, may_go = threading.Event(), threading.Event()

    def hang(batch: list[WaitingForward]) -> torch.Tensor:
        entered.set()
        assert may_go.wait(30)
        return batch[0].forward.hidden_states

    batcher = Batcher(hang, max_waiting=4, max_waiting_bytes=2**20)
    batcher.start()
    assert batcher.signs_of_life is None
    futures = [submit(batcher, LAYERS[0], forward_of(1.0))]
    assert entered.wait(30)
    before = batcher.signs_of_life
    futures.append(submit(batcher, LAYERS[1], forward_of(2.0)))
    assert batcher.signs_of_life == before is not None
    may_go.set()
    for future in futures:
        future.result(30)
    batcher.stop()
    assert batcher.signs_of_life is None
    assert batcher._num_rounds > before
