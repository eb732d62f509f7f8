"""What is recorded is what the gate chose, token by token, and continuing a prompt is what the served model does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attention.sampling_params import SamplingParams
from cluster.bundled_model.corpus import Kind
from cluster.commands.trace_recording import RecordingDispatcher, record
from cluster.commands.trace_requests import RecordingConfig
from cluster.config import parse_config
from cluster.roles.single_process import SequenceTooLong, SingleProcess
from router.trace.trace_file import TraceFile
from tests.checkpoints import write_checkpoint
from tests.router.trace.traces import random_ids, tiny_model


class FakeDispatcher:
    """Answers with the layer's number."""

    def dispatch(self, layer_id: int, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Any:
        return layer_id

    def combine(self, handle: Any) -> Tensor:
        return torch.tensor(handle)

    def abandon(self, handle: Any) -> None:
        raise AssertionError


def test_micro_batches_of_several_layers_are_put_together_in_the_order_of_tokens() -> None:
    model = tiny_model(layers=3)
    chosen = random_ids(model, 10, seed=0)
    dispatcher = RecordingDispatcher(FakeDispatcher(), model)
    empty = torch.empty(0)
    for rows in (slice(0, 6), slice(6, 10)):  # two steps
        for row, layer_id in enumerate(model.moe_layer_ids):
            for part in np.array_split(np.arange(10)[rows], 2):  # of two micro-batches
                topk_ids = torch.from_numpy(chosen[row, part].astype(np.int64))
                handle = dispatcher.dispatch(layer_id, empty, empty, topk_ids)
                assert dispatcher.combine(handle).item() == layer_id
    np.testing.assert_array_equal(dispatcher.take(), chosen)
    dispatcher.dispatch(1, empty, empty, torch.zeros((4, 2), dtype=torch.int64))  # a step that failed midway
    for layer_id in (2, 3):
        dispatcher.dispatch(layer_id, empty, empty, torch.zeros((3, 2), dtype=torch.int64))
    assert dispatcher.take().shape == (3, 3, 2)


def test_a_greedy_continuation_is_the_most_likely_token_again_and_again(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny", "v2", seed=3)
    config = parse_config(
        {"model": str(folder), "dtype": "float32", "attention_workers": {"engine": {"num_blocks": 1}}}
    )
    params = SamplingParams(temperature=0.0, seed=0, max_tokens=8)
    prompt = [5, 9, 2, 7]
    with SingleProcess(config) as process:
        new = list(process.generate(prompt, 8, params))
        logits = process.logits(prompt + new)
        assert logits[3:-1].argmax(dim=-1).tolist() == new
        with pytest.raises(SequenceTooLong, match="limit is"):
            list(process.generate(prompt, 1000, params))


def test_the_bundled_model_is_recorded_on_its_four_kinds_of_text(tmp_path: Path) -> None:
    told: list[tuple[str, int]] = []
    config = RecordingConfig(model="bundled", max_tokens=900)
    recording = record(config, tmp_path / "trace.npz", lambda stage, count: told.append((stage, count)))
    assert set(recording.num_tokens_by_label) == {kind.value for kind in Kind}
    assert recording.num_tokens == 900
    assert min(recording.num_tokens_by_label.values()) > 100
    trace = TraceFile(tmp_path / "trace.npz")
    assert trace.num_tokens == 900
    assert [count for _, count in told] == sorted(count for _, count in told)
    starts = [window.start_s for window in trace.windows()]
    assert starts == sorted(starts)
    assert recording.seconds >= starts[-1]
    model = trace.header.model
    assert (model.num_moe_layers, model.gate.n_group, model.gate.topk_group, model.itemsize) == (5, 8, 3, 4)
    for window in trace.windows():
        groups = window.topk_ids // model.gate.experts_per_group
        assert max(len(set(token)) for layer in groups.tolist() for token in layer) <= 3
