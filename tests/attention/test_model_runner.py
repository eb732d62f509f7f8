import torch

from attention.model_runner import ModelRunner, attention_metadata
from attention.scheduler import ScheduledBatch, ScheduledSequence
from tests.attention.fake_decoder import CountingDecoder, make_sequence


def scheduled(prompt, num_computed, num_tokens, block_table):
    sequence = make_sequence(prompt)
    sequence.num_computed_tokens = num_computed
    return ScheduledSequence(sequence=sequence, num_scheduled_tokens=num_tokens, block_table=block_table)


BATCH = ScheduledBatch(
    sequences=(
        scheduled([10, 11, 12, 13, 14], num_computed=4, num_tokens=1, block_table=(7, 2, 9)),
        scheduled([20, 21, 22, 23, 24, 25], num_computed=1, num_tokens=3, block_table=(5, 3)),
        scheduled([30, 31], num_computed=0, num_tokens=2, block_table=(0,)),
    )
)


def test_metadata_by_hand():
    metadata = attention_metadata(BATCH, block_size=4, device=torch.device("cpu"))
    assert metadata.positions.tolist() == [4, 1, 2, 3, 0, 1]
    assert metadata.slot_mapping.tolist() == [8, 21, 22, 23, 0, 1]
    assert metadata.query_start_loc == (0, 1, 4, 6)
    assert metadata.seq_lens == (5, 4, 2)
    assert metadata.block_tables.tolist() == [[7, 2], [5, 0], [0, 0]]  # blocks without context are left out
    assert (metadata.positions.dtype, metadata.slot_mapping.dtype) == (torch.int64, torch.int64)
    assert metadata.block_tables.dtype == torch.int32


def test_only_sequences_whose_last_token_is_computed_are_sampled():
    decoder = CountingDecoder()
    seen = []
    decoder.before_forward = lambda token_ids: seen.append(token_ids.tolist())
    tokens = ModelRunner(decoder, block_size=4).run(BATCH)
    assert seen == [[14, 21, 22, 23, 30, 31]]
    assert [None if token is None else token.token_id for token in tokens] == [15, None, 32]


def test_what_was_left_out_is_charged_to_the_sequence_of_its_row_and_adds_up():
    class OverloadedDecoder(CountingDecoder):
        num_dropped = torch.tensor([5, 0, 1, 2, 0, 0])

    sequences = [scheduled.sequence for scheduled in BATCH.sequences]
    before = [sequence.num_dropped_assignments for sequence in sequences]
    assert before == [0, 0, 0]
    for _ in range(2):
        ModelRunner(OverloadedDecoder(), block_size=4).run(BATCH)
    assert [sequence.num_dropped_assignments for sequence in sequences] == [10, 6, 0]


def test_who_asked_is_told_that_the_layers_begin():
    told: list[str] = []
    ModelRunner(CountingDecoder(), block_size=4).run(BATCH, lambda: told.append("begun"))
    assert told == ["begun"]


def test_logits_are_not_computed_when_nothing_is_sampled():
    class NoLogits(CountingDecoder):
        def logits(self, hidden_states):
            raise AssertionError

    batch = ScheduledBatch(sequences=BATCH.sequences[1:2])
    assert ModelRunner(NoLogits(), block_size=4).run(batch) == [None]
