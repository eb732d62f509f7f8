"""A shard finds out that its weights changed, refuses the unit, reads it again. Nothing here starts a thread."""

import gc
import weakref

import pytest
import torch

from experts.shard import ExpertShard
from protos import expert_pb2
from protos.errors import MobulaError, UnitQuarantined
from protos.memory import Memory
from tests.fake_experts import RandomReader, expert_shard, grouped_gate, placed, small_model

MODEL = small_model()
MAP = placed(grouped_gate(), 1)
NUM_EXPERTS = 3 * 16  # of all layers


@pytest.fixture
def shard() -> ExpertShard:
    return expert_shard(MAP, 0, MODEL)


def check_all(shard: ExpertShard) -> None:
    for _ in range(NUM_EXPERTS):
        shard._check_next()


def damage(shard: ExpertShard, layer_id: int, expert_id: int) -> None:
    """Flips bits of its weights, in place."""
    w2 = shard._store._experts[layer_id, expert_id].w2
    weights = w2 if isinstance(w2, torch.Tensor) else w2.data
    weights.view(torch.uint8).view(-1)[3::4] ^= 0x40


def answer_of(shard: ExpertShard, layer_id: int, expert_id: int) -> MobulaError | None:
    """What a forward of one row is refused with."""
    header = expert_pb2.ForwardHeader(
        sequence_number=1, layer_id=layer_id, placement_version=1, num_rows=1, num_assignments=1, num_partial_sums=1,
        dtype=1,
    )  # fmt: skip
    tensors = (torch.ones(MODEL.hidden_size), torch.ones(1), torch.tensor([[0], [expert_id], [0]], dtype=torch.int32))
    payload = b"".join(tensor.numpy().tobytes() for tensor in tensors)
    outcomes: list = []
    shard.submit(header, Memory.of(payload), outcomes.append)
    shard._batcher.compute_next()
    (outcome,) = outcomes
    return outcome if isinstance(outcome, MobulaError) else None


def test_weights_that_stay_as_they_were_are_never_wrong(shard):
    check_all(shard)
    check_all(shard)
    assert shard.wrong_units() == []
    assert shard._metrics.num_self_checks == 2 * NUM_EXPERTS


def test_a_unit_whose_weights_changed_is_refused_and_the_others_are_not(shard):
    damage(shard, layer_id=2, expert_id=5)
    check_all(shard)
    (wrong,) = shard.wrong_units()
    assert (wrong.layer_id, wrong.unit_id) == (2, 2)  # units of two experts
    assert "expert 5 gives 0x" in wrong.reason
    error = answer_of(shard, 2, 4)
    assert isinstance(error, UnitQuarantined)
    assert error.unit_ids == (2,)
    assert answer_of(shard, 2, 6) is None
    assert answer_of(shard, 1, 5) is None
    assert shard.expert(2, 5) is None  # nobody copies it
    assert shard.expert(1, 5) is not None


def test_a_wrong_unit_is_used_again_when_it_was_read_again_and_is_right(shard):
    before = answer_bits(shard)
    damage(shard, layer_id=2, expert_id=5)
    check_all(shard)
    shard.repair()
    assert shard.wrong_units() == []
    assert answer_of(shard, 2, 5) is None
    assert answer_bits(shard) == before
    check_all(shard)
    assert shard.wrong_units() == []


def answer_bits(shard: ExpertShard) -> dict[tuple[int, int], int]:
    for layer in shard._store.layers(1):
        for expert_id in range(16):
            assert shard._self_check._known.fault(layer, expert_id) is None
    return dict(shard._self_check._known._answers)


def test_a_unit_with_two_damaged_experts_is_read_again_once(shard):
    told: list[None] = []
    shard._self_check._on_wrong = lambda: told.append(None)
    damage(shard, layer_id=2, expert_id=4)
    damage(shard, layer_id=2, expert_id=5)
    while not shard.wrong_units():
        shard._check_next()
    shard.repair()
    check_all(shard)
    assert shard.wrong_units() == []
    assert len(told) == 1


def test_weights_that_are_released_during_a_sweep_are_given_back(shard):
    w2 = shard._store._experts[1, 0].w2
    held = weakref.ref(w2 if isinstance(w2, torch.Tensor) else w2.data)
    shard._check_next()
    shard._store.activate(2, ())
    shard._store.release(1)
    del w2
    gc.collect()
    assert held() is None
    check_all(shard)  # of experts that have gone nothing is asked
    assert shard._metrics.num_self_checks == 1


def test_a_unit_that_the_checkpoint_gives_otherwise_now_stays_quarantined(shard, monkeypatch):
    damage(shard, layer_id=2, expert_id=5)
    check_all(shard)
    read = RandomReader.read_matrix
    monkeypatch.setattr(RandomReader, "read_matrix", lambda self, name: 2 * read(self, name))
    shard.repair()
    (wrong,) = shard.wrong_units()
    assert "and does so after it was read again" in wrong.reason


def test_whoever_controls_the_shard_is_told_once_of_a_unit_that_is_wrong(shard):
    told: list[None] = []
    shard._self_check._on_wrong = lambda: told.append(None)
    damage(shard, layer_id=1, expert_id=0)
    check_all(shard)
    check_all(shard)
    assert len(told) == 1


def test_what_waits_for_a_layer_when_a_unit_of_it_is_found_wrong_is_asked_of_others(shard):
    outcomes: list = []
    header = expert_pb2.ForwardHeader(sequence_number=1, layer_id=1, placement_version=1, dtype=1)
    shard.submit(header, Memory.of(b""), outcomes.append)
    damage(shard, layer_id=1, expert_id=0)
    check_all(shard)
    assert [type(outcome).__name__ for outcome in outcomes] == ["StalePlacement"]


def test_a_unit_that_was_read_wrongly_is_sure_of_itself_until_it_is_told_to_read_again(monkeypatch):
    right = expert_shard(MAP, 0, MODEL).known_answers()
    read = RandomReader.read_matrix

    def read_wrongly(self, name):
        return read(self, name) + (name == "model.layers.2.mlp.experts.5.down_proj.weight")

    monkeypatch.setattr(RandomReader, "read_matrix", read_wrongly)
    shard = expert_shard(MAP, 0, MODEL)
    monkeypatch.undo()
    check_all(shard)
    assert shard.wrong_units() == []
    assert {key for key, answer in shard.known_answers().items() if answer != right[key]} == {(2, 5)}
    shard.read_again([(2, 5)])
    assert shard.known_answers() == right
    check_all(shard)
    assert shard.wrong_units() == []
