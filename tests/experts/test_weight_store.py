from dataclasses import replace

import pytest
import torch

from experts.grouped_ffn import ExpertWeights
from experts.kernels.library import native
from experts.quantized_matrix import QuantizedMatrix
from experts.weight_store import ExpertModel, Unit, WeightShapeError, WeightStore
from protos.errors import StalePlacement
from tests.fake_experts import RandomReader, small_model

FIRST, SECOND = Unit(1, 0, (0, 1)), Unit(4, 3, (6, 7))


def test_a_units_tensors_are_read_once_by_their_published_names():
    model = small_model()
    reader = RandomReader(model)
    store = WeightStore(model, reader, use_kernels=False)
    store.activate(1, [FIRST])
    assert reader.names_read == [
        f"model.layers.1.mlp.experts.{expert_id}.{name}_proj.weight"
        for expert_id in (0, 1)
        for name in ("gate", "up", "down")
    ]
    weights = store.layer(1, 1).experts[1]
    gate, up, down = (
        reader.read(f"model.layers.1.mlp.experts.1.{name}_proj.weight") for name in ("gate", "up", "down")
    )
    assert torch.equal(weights.w13, torch.cat((gate, up)))
    assert torch.equal(weights.w2, down)


def test_weights_are_kept_in_the_models_dtype_and_their_bytes_counted():
    model = small_model(torch.bfloat16)
    store = WeightStore(model, RandomReader(model), use_kernels=False)
    store.activate(1, [FIRST, SECOND])
    assert store.layer(1, 4).experts[6].w2.dtype == torch.bfloat16
    assert store.weight_bytes == 4 * model.expert_bytes == 4 * 3 * 48 * 24 * 2
    assert store.num_units == 2


def test_an_expert_in_two_units_is_counted_once():
    model = small_model()
    store = WeightStore(model, RandomReader(model), use_kernels=False)
    store.activate(1, [FIRST])
    store.activate(2, [Unit(1, 5, (1, 2))])  # of another cut
    assert store.weight_bytes == 3 * model.expert_bytes


def test_bytes_are_counted_while_another_unit_is_read():
    model = small_model()
    store = WeightStore(model, RandomReader(model), use_kernels=False)

    class Counted(ExpertWeights):
        """While it is counted another thread has its turn."""

        @property
        def nbytes(self) -> int:
            store.stage([SECOND])
            return self.w13.nbytes + self.w2.nbytes

    weights = torch.zeros(48, 48), torch.zeros(48, 24)
    store.stage([FIRST], copy=lambda *_: Counted(w13=weights[0], w2=weights[1]))
    assert store.weight_bytes == 2 * model.expert_bytes


def test_a_layer_knows_the_unit_of_each_expert_it_holds_and_no_other():
    model = small_model()
    store = WeightStore(model, RandomReader(model))
    store.activate(1, [SECOND])
    assert store.layer(1, 4).expert_to_unit.tolist() == [-1] * 6 + [3, 3] + [-1] * 8
    assert store.layer(1, 2).expert_to_unit.tolist() == [-1] * 16
    assert store.layer(1, 3) is None


def test_two_versions_are_served_at_once_and_share_what_both_hold():
    model = small_model()
    reader = RandomReader(model)
    store = WeightStore(model, reader, use_kernels=False)
    store.activate(1, [FIRST])
    store.stage([SECOND])
    num_read = len(reader.names_read)
    store.activate(2, [FIRST, SECOND])
    assert len(reader.names_read) == num_read
    assert store.versions == (1, 2)
    assert store.layer(1, 1).experts[0].w2.data_ptr() == store.layer(2, 1).experts[0].w2.data_ptr()
    store.release(1)
    assert store.num_units == 2
    store.activate(3, [FIRST])
    store.release(2)
    assert (store.versions, store.num_units) == ((3,), 1)


def test_units_that_were_only_staged_are_dropped_with_the_version_that_was_given_up():
    model = small_model()
    store = WeightStore(model, RandomReader(model))
    store.activate(1, [FIRST])
    read: list[int] = []
    store.stage([FIRST, SECOND], read.append)
    assert (store.num_units, sum(read)) == (2, 2 * model.expert_bytes)  # each expert of the second unit
    assert sum(read) >= 2 * model.expert_bytes
    store.release(2)  # never activated
    assert (store.versions, store.num_units) == ((1,), 1)
    assert store.layer(1, 1) is not None


def test_a_version_that_is_not_served_is_refused_with_those_that_are():
    model = small_model()
    store = WeightStore(model, RandomReader(model))
    store.activate(4, [FIRST])
    with pytest.raises(StalePlacement, match=r"version 3 is not served here, only \[4\]"):
        store.layer(3, 1)


def test_a_tensor_of_another_shape_is_named_with_both_shapes():
    reader = RandomReader(small_model(hidden_size=32))
    store = WeightStore(small_model(), reader)
    with pytest.raises(WeightShapeError, match=r"experts.0.gate_proj.weight is \[24, 32\] .* says \[24, 48\]"):
        store.stage([FIRST])
    assert reader.names_read == []


class MixedReader(RandomReader):
    """Some matrices as int8."""

    def __init__(self, model: ExpertModel, quantized: str, group_size: int = 24) -> None:
        super().__init__(model)
        self._quantized, self._group_size = quantized, group_size

    def read_matrix(self, name: str) -> torch.Tensor | QuantizedMatrix:
        matrix = self.read(name)
        return QuantizedMatrix.quantize(matrix, 8, self._group_size) if self._quantized in name else matrix


def test_an_expert_whose_matrices_are_of_different_kinds_is_computed_in_the_models_dtype():
    model = small_model()
    store = WeightStore(model, MixedReader(model, "up_proj"))
    store.activate(1, [FIRST])
    plain = WeightStore(model, RandomReader(model))
    plain.activate(1, [FIRST])
    assert store.weight_bytes == plain.weight_bytes


@pytest.mark.skipif(native() is None, reason="torch computes experts one by one, whatever their kind")
def test_experts_of_different_kinds_in_a_layer_are_refused():
    model = replace(small_model(hidden_size=96), moe_intermediate_size=48)
    reader = MixedReader(model, "experts.1.", group_size=48)
    with pytest.raises(WeightShapeError, match="layer 1 are stored in several formats"):
        WeightStore(model, reader).activate(1, [FIRST])
