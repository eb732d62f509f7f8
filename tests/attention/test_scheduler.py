import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.block_manager import BlockManager
from attention.scheduler import Scheduler
from attention.sequence import SequenceStatus
from tests.attention.fake_decoder import make_sequence


def make_scheduler(num_blocks=16, block_size=4, max_num_seqs=8, max_num_batched_tokens=8):
    manager = BlockManager(num_blocks=num_blocks, block_size=block_size)
    scheduler = Scheduler(manager, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)
    return scheduler, manager


def add(scheduler, prompt_len, max_tokens=8, name="request"):
    sequence = make_sequence([0] * prompt_len, max_tokens=max_tokens, name=name)
    scheduler.add(sequence)
    return sequence


def compute(scheduler):
    """One step, in which every sequence that needs a sample gets token 0. Returns (name, number of tokens) pairs."""
    batch = scheduler.schedule()
    if batch is None:
        return []
    samples = [part.sequence for part in batch.sequences if part.needs_sample]
    parts = [(part.sequence.request_id, part.num_scheduled_tokens) for part in batch.sequences]
    scheduler.commit(batch)
    for sequence in samples:
        if sequence.advance(0).is_final:
            scheduler.remove(sequence)
    return parts


def test_long_prompt_is_cut_into_chunks_and_sampled_at_its_end():
    scheduler, _ = make_scheduler(max_num_batched_tokens=8)
    sequence = add(scheduler, 19)
    assert [compute(scheduler) for _ in range(3)] == [[("request", 8)], [("request", 8)], [("request", 3)]]
    assert sequence.num_output_tokens == 1
    assert compute(scheduler) == [("request", 1)]


def test_decodes_come_first_and_waiting_prompts_share_what_is_left():
    scheduler, _ = make_scheduler(max_num_batched_tokens=8)
    add(scheduler, 2, name="a")
    assert compute(scheduler) == [("a", 2)]
    add(scheduler, 12, name="b")
    add(scheduler, 5, name="c")
    assert compute(scheduler) == [("a", 1), ("b", 7)]
    assert compute(scheduler) == [("a", 1), ("b", 5), ("c", 2)]
    assert compute(scheduler) == [("a", 1), ("b", 1), ("c", 3)]


def test_no_more_sequences_run_than_allowed():
    scheduler, _ = make_scheduler(max_num_seqs=2)
    for name in "abc":
        add(scheduler, 1, max_tokens=2, name=name)
    assert compute(scheduler) == [("a", 1), ("b", 1)]
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)


def test_a_waiting_sequence_is_never_passed_over():
    scheduler, _ = make_scheduler(num_blocks=4, block_size=4, max_num_batched_tokens=16)
    add(scheduler, 8, max_tokens=4, name="a")
    add(scheduler, 12, max_tokens=4, name="large")
    add(scheduler, 1, max_tokens=1, name="small")
    assert compute(scheduler) == [("a", 8)]


def test_latest_arrival_gives_its_blocks_to_the_oldest_and_keeps_its_tokens():
    scheduler, manager = make_scheduler(num_blocks=4, block_size=4, max_num_batched_tokens=16)
    old = add(scheduler, 4, max_tokens=12, name="old")
    young = add(scheduler, 4, max_tokens=12, name="young")
    for _ in range(5):
        compute(scheduler)  # prompts, then four decodes each: every block is in use and full
    assert manager.num_free == 0
    assert compute(scheduler) == [("old", 1)]
    assert young.status is SequenceStatus.WAITING
    assert (young.num_computed_tokens, young.num_output_tokens, young.num_preemptions) == (0, 5, 1)
    while not old.is_finished:
        compute(scheduler)
    assert compute(scheduler) == [("young", 9)]
    assert scheduler.num_preemptions == 1


def test_the_latest_arrival_sits_out_rather_than_take_blocks_from_older_ones():
    scheduler, manager = make_scheduler(num_blocks=3, block_size=4, max_num_batched_tokens=16)
    old = add(scheduler, 5, max_tokens=3, name="old")
    young = add(scheduler, 4, max_tokens=6, name="young")
    assert compute(scheduler) == [("old", 5), ("young", 4)]
    assert manager.num_free == 0
    assert compute(scheduler) == [("old", 1)]
    assert young.status is SequenceStatus.RUNNING
    compute(scheduler)
    assert old.is_finished
    assert compute(scheduler) == [("young", 1)]


def test_removed_sequence_frees_its_blocks_wherever_it_is():
    scheduler, manager = make_scheduler(max_num_seqs=1)
    running, waiting = add(scheduler, 4), add(scheduler, 4)
    compute(scheduler)
    scheduler.remove(waiting)
    scheduler.remove(running)
    scheduler.remove(running)
    assert manager.num_free == 16
    assert not scheduler.has_unfinished
    assert scheduler.schedule() is None


def test_sequence_that_can_never_fit_is_told_apart():
    scheduler, _ = make_scheduler(num_blocks=2, block_size=4)
    assert scheduler.can_ever_run(make_sequence([0] * 4, max_tokens=4))
    assert not scheduler.can_ever_run(make_sequence([0] * 4, max_tokens=5))


@pytest.mark.parametrize("limits", [{"max_num_seqs": 0}, {"max_num_batched_tokens": 0}])
def test_limits_below_one_are_refused(limits):
    with pytest.raises(ValueError, match="must be 1 or more"):
        make_scheduler(**limits)


REQUESTS = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=1, max_size=10)


@settings(max_examples=200, deadline=None)
@given(
    requests=REQUESTS,
    num_blocks=st.integers(8, 12),
    max_num_seqs=st.integers(1, 6),
    budget=st.integers(6, 24),
    data=st.data(),
)
def test_every_sequence_ends_and_nothing_leaks(requests, num_blocks, max_num_seqs, budget, data):
    scheduler, manager = make_scheduler(num_blocks, 4, max_num_seqs, budget)
    to_come = [make_sequence([0] * prompt_len, max_tokens=max_tokens) for prompt_len, max_tokens in requests]
    sequences = list(to_come)
    while to_come or scheduler.has_unfinished:
        if to_come and (not scheduler.has_unfinished or data.draw(st.booleans())):
            scheduler.add(to_come.pop(0))
        aborted = data.draw(st.sampled_from([None] * 20 + sequences))
        if aborted is not None and aborted not in to_come:
            scheduler.remove(aborted)
        batch = scheduler.schedule()
        assert (batch is not None) == scheduler.has_unfinished, "work is left, and none is scheduled"
        manager.check_integrity()
        if batch is None:
            continue
        assert batch.num_tokens <= budget
        assert scheduler.num_running <= max_num_seqs
        assert len({part.sequence for part in batch.sequences}) == len(batch.sequences)
        for part in batch.sequences:
            assert part.num_scheduled_tokens >= 1
            assert part.seq_len <= part.sequence.num_tokens
            assert len(part.block_table) * 4 >= part.seq_len
        samples = [part.sequence for part in batch.sequences if part.needs_sample]
        scheduler.commit(batch)
        for sequence in samples:
            if sequence.advance(0).is_final:
                scheduler.remove(sequence)
    assert all(sequence.is_finished for sequence in sequences)
    assert manager.num_free == num_blocks
