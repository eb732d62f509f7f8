import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from attention.block_manager import BlockIntegrityError, BlockManager
from tests.attention.fake_decoder import make_sequence

NUM_BLOCKS, BLOCK_SIZE = 7, 3


def test_a_block_more_is_taken_only_when_the_last_one_is_full():
    manager = BlockManager(num_blocks=4, block_size=3)
    sequence = make_sequence()
    for num_tokens, num_used in [(1, 1), (3, 1), (4, 2), (6, 2), (7, 3)]:
        manager.allocate(sequence, num_tokens)
        assert manager.num_used == num_used
        assert len(manager.block_table(sequence)) == num_used


def test_more_than_is_free_cannot_be_allocated():
    manager = BlockManager(num_blocks=2, block_size=3)
    first, second = make_sequence(), make_sequence()
    manager.allocate(first, 4)
    assert not manager.can_allocate(second, 1)
    assert manager.can_allocate(first, 6)
    with pytest.raises(AssertionError):
        manager.allocate(second, 1)


def test_freeing_twice_frees_once():
    manager = BlockManager(num_blocks=2, block_size=3)
    sequence = make_sequence()
    manager.allocate(sequence, 4)
    manager.free(sequence)
    manager.free(sequence)
    manager.check_integrity()
    assert manager.num_free == 2


def test_a_block_with_two_owners_is_found():
    manager = BlockManager(num_blocks=2, block_size=3)
    sequence = make_sequence()
    manager.allocate(sequence, 4)
    manager._free_block_ids.append(0)
    with pytest.raises(BlockIntegrityError, match="2 owned and 1 free"):
        manager.check_integrity()


class BlockManagerMachine(RuleBasedStateMachine):
    """Any order of calls, against a model that only counts."""

    def __init__(self):
        super().__init__()
        self.manager = BlockManager(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
        self.sequences = [make_sequence() for _ in range(4)]
        self.num_held = dict.fromkeys(self.sequences, 0)

    @rule(index=st.integers(0, 3), num_tokens=st.integers(0, NUM_BLOCKS * BLOCK_SIZE))
    def allocate_if_possible(self, index, num_tokens):
        sequence = self.sequences[index]
        missing = max(0, -(-num_tokens // BLOCK_SIZE) - self.num_held[sequence])
        is_possible = missing <= NUM_BLOCKS - sum(self.num_held.values())
        assert self.manager.can_allocate(sequence, num_tokens) == is_possible
        if is_possible:
            before = self.manager.block_table(sequence)
            self.manager.allocate(sequence, num_tokens)
            self.num_held[sequence] += missing
            assert self.manager.block_table(sequence)[: len(before)] == before

    @rule(index=st.integers(0, 3))
    def free(self, index):
        self.manager.free(self.sequences[index])
        self.num_held[self.sequences[index]] = 0

    @invariant()
    def every_block_is_free_or_owned_once(self):
        self.manager.check_integrity()
        assert self.manager.num_used == sum(self.num_held.values())
        tables = [self.manager.block_table(sequence) for sequence in self.sequences]
        owned = [block_id for table in tables for block_id in table]
        assert len(owned) == len(set(owned))
        assert [len(table) for table in tables] == list(self.num_held.values())


TestBlockManagerMachine = BlockManagerMachine.TestCase
TestBlockManagerMachine.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
