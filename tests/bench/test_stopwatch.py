from contextlib import ExitStack
from types import SimpleNamespace

from tests.bench.stopwatch import ANSWER_SEAM, BETWEEN, FFN, QUEUE, SEAMS, STEP, WAIT, Stopwatch, _find


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def work(self, seconds: float) -> None:
        self.now_s += seconds


def test_a_part_is_not_charged_for_the_parts_that_it_calls() -> None:
    clock = Clock()
    stopwatch = Stopwatch(clock)
    stopwatch.begin(8, 8)
    batch = SimpleNamespace(sequences=range(8), num_tokens=8)
    attention = stopwatch.timed("attention", lambda: clock.work(2.0))

    def layers(runner: object, batch: object) -> None:
        clock.work(1.0)
        attention()
        attention()

    runner = stopwatch.timed("batch and metadata", layers)
    step = stopwatch.timed(STEP, lambda: (clock.work(0.5), runner(None, batch)))
    step()
    clock.work(0.25)
    step()
    first, second = stopwatch.steps
    assert first == {"attention": 4.0, "batch and metadata": 1.0, STEP: 0.5}
    assert second == first | {BETWEEN: 0.25}


def test_waiting_for_a_processor_is_not_time_outside_the_kernels() -> None:
    wall, busy = Clock(), Clock()
    stopwatch = Stopwatch(wall, busy)
    stopwatch.begin(1, 1)

    def work(seconds: float, waits_s: float) -> None:
        busy.work(seconds)
        wall.work(seconds + waits_s)

    attention = stopwatch.timed("attention", lambda: work(2.0, 0.0))
    send = stopwatch.timed("plan, pack and send", lambda: work(0.5, 3.0))
    runner = stopwatch.timed("batch and metadata", lambda runner, batch: (attention(), send(), work(0.25, 0.0)))
    step = stopwatch.timed(STEP, lambda: runner(None, SimpleNamespace(sequences=[0], num_tokens=1)))
    step()
    assert stopwatch.steps == [{"attention": 2.0, "plan, pack and send": 3.5, "batch and metadata": 0.25, STEP: 0.0}]
    assert stopwatch.busy_outside == [0.75]


def test_steps_of_another_shape_are_not_counted() -> None:
    clock = Clock()
    stopwatch = Stopwatch(clock)
    stopwatch.begin(8, 8)
    runner = stopwatch.timed("batch and metadata", lambda runner, batch: clock.work(1.0))
    step = stopwatch.timed(STEP, lambda num_tokens: runner(None, SimpleNamespace(sequences=[0], num_tokens=num_tokens)))
    step(8)
    assert stopwatch.steps == []


def test_wait_is_split_by_the_slowest_answer() -> None:
    clock = Clock()
    stopwatch = Stopwatch(clock)

    def answer(queue_s: float, compute_s: float) -> object:
        timing = SimpleNamespace(queue_ns=1e9 * queue_s, compute_ns=1e9 * compute_s)
        return SimpleNamespace(header=SimpleNamespace(timing=timing))

    accept = stopwatch._noting(lambda message, answer, hidden_states: None)

    def wait() -> None:
        clock.work(5.0)
        accept(None, answer(0.5, 1.0), None)
        accept(None, answer(1.0, 3.0), None)

    stopwatch.timed(WAIT, wait)()
    assert stopwatch._seconds[FFN] == 3.0
    assert stopwatch._seconds[QUEUE] == 1.0
    assert stopwatch._seconds[WAIT] == 1.0


def test_every_part_has_a_seam_in_the_code_of_today() -> None:
    assert _find(*ANSWER_SEAM)
    lost = {part for part, _, _ in SEAMS} - {part for part, module, name in SEAMS if _find(module, name)}
    assert lost == set()


def test_seams_are_as_before_afterwards() -> None:
    before = {(module, name): getattr(*found) for _, module, name in SEAMS if (found := _find(module, name))}
    with ExitStack() as stack:
        Stopwatch().install(stack)
        assert any(getattr(*_find(*seam)) is not code for seam, code in before.items())
    assert all(getattr(*_find(*seam)) is code for seam, code in before.items())
