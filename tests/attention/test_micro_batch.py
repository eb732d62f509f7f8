from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attention.attention_metadata import AttentionMetadata
from attention.micro_batch import MIN_ROWS, NUM_TRIALS, TRIAL_INTERVAL, MicroBatchCount
from experts.kernels.library import native
from tests.attention.steps import StepRunner, random_token_ids
from tests.checkpoints import write_checkpoint


def run_steps(
    count: MicroBatchCount, seconds: dict[int, float], num_steps: int, num_rows: int = 64, num_seqs: int = 64
) -> list[int]:
    chosen = []
    for _ in range(num_steps):
        chosen.append(count.choose(num_rows, num_seqs))
        count.record(num_rows, num_seqs, chosen[-1], seconds[chosen[-1]])
    return chosen


TRIALS = [1, 2] * NUM_TRIALS


def test_the_faster_count_is_used_after_each_was_tried_in_turn() -> None:
    assert run_steps(MicroBatchCount(), {1: 3.0, 2: 2.0}, 10) == [*TRIALS, 2, 2, 2, 2]
    assert run_steps(MicroBatchCount(), {1: 2.0, 2: 3.0}, 10) == [*TRIALS, 1, 1, 1, 1]


def test_a_cold_first_step_decides_nothing() -> None:
    count = MicroBatchCount()
    run_steps(count, {1: 90.0}, 1)
    assert run_steps(count, {1: 2.0, 2: 3.0}, 9)[-3:] == [1, 1, 1]


def test_a_gain_within_the_noise_is_no_reason_to_cut() -> None:
    assert run_steps(MicroBatchCount(), {1: 2.0, 2: 1.98}, 10)[-1] == 1


def test_the_other_count_is_tried_again_now_and_then_and_wins_when_things_have_changed() -> None:
    count = MicroBatchCount()
    assert run_steps(count, {1: 2.0, 2: 3.0}, TRIAL_INTERVAL).count(2) == NUM_TRIALS + 1
    assert 2 in run_steps(count, {1: 9.0, 2: 1.0}, 3 * TRIAL_INTERVAL)[-10:]


def test_steps_of_different_kinds_are_measured_apart_and_small_ones_never_cut() -> None:
    count = MicroBatchCount()
    run_steps(count, {1: 2.0, 2: 3.0}, len(TRIALS), num_rows=64, num_seqs=64)
    run_steps(count, {1: 3.0, 2: 2.0}, len(TRIALS), num_rows=64, num_seqs=1)
    run_steps(count, {1: 3.0, 2: 2.0}, len(TRIALS), num_rows=1000, num_seqs=64)
    assert (count.choose(65, 64), count.choose(64, 1), count.choose(1000, 64)) == (1, 2, 2)
    assert run_steps(MicroBatchCount(), {1: 1.0}, 5, num_rows=MIN_ROWS - 1, num_seqs=1) == [1] * 5


def test_a_fixed_count_is_kept_where_there_are_as_many_rows() -> None:
    assert [MicroBatchCount(3).choose(n, 1) for n in (1, 2, 3, 100)] == [1, 2, 3, 3]


@given(lens=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 20)), min_size=1, max_size=6), count=st.integers(1, 4))
def test_parts_have_every_row_once_with_the_context_it_had(lens: list[tuple[int, int]], count: int) -> None:
    """lens: rows and earlier tokens of each sequence."""
    loc = [0]
    for num_rows, _ in lens:
        loc.append(loc[-1] + num_rows)
    count = min(count, loc[-1])
    metadata = AttentionMetadata(
        positions=torch.cat([torch.arange(before, before + num_rows) for num_rows, before in lens]),
        slot_mapping=torch.arange(loc[-1]),
        query_start_loc=tuple(loc),
        seq_lens=tuple(num_rows + before for num_rows, before in lens),
        num_prompt_tokens=tuple(range(len(lens))),
        block_tables=torch.arange(len(lens), dtype=torch.int32).unsqueeze(1),
    )
    seen = []
    for rows, part in metadata.split(count):
        assert part.slot_mapping.tolist() == list(range(rows.start, rows.stop))
        for i in range(part.num_seqs):
            start, end = part.query_start_loc[i : i + 2]
            assert part.positions[start:end].tolist() == list(range(part.seq_lens[i] - (end - start), part.seq_lens[i]))
            seen += [(int(part.block_tables[i, 0]), slot) for slot in part.slot_mapping[start:end].tolist()]
            assert part.num_prompt_tokens[i] == int(part.block_tables[i, 0])
    assert seen == [(i, slot) for i in range(len(lens)) for slot in range(loc[i], loc[i + 1])]


@pytest.mark.skipif(native() is None, reason="the CPU kernels are not built; torch rounds rows otherwise beside others")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_micro_batches_changes_no_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = write_checkpoint(tmp_path, "v2")

    def logits(num_micro_batches: int) -> torch.Tensor:
        runner = StepRunner(folder, dtype=dtype, num_micro_batches=num_micro_batches)
        sequences = [runner.sequence(random_token_ids(n, seed=n), n - 5) for n in (90, 21, 40)]
        runner.step([(sequence, len(sequence.token_ids) - 5) for sequence in sequences])
        for _ in range(5):
            runner.step([(sequence, 1) for sequence in sequences])
        return torch.cat([torch.cat(sequence.logits) for sequence in sequences])

    one = logits(1)
    assert torch.equal(logits(2), one)
    assert torch.equal(logits(5), one)
