# ruff: noqa: E501  the texts read better whole
"""The model that comes with the package: what it is, what it writes, and that its routing was learned."""

import itertools

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from attention.tokenizer import Tokenizer
from cluster import bundled_model
from cluster.checkpoint.checkpoint import Checkpoint
from tests.attention.steps import StepRunner, relative_error
from tests.reference import Reference

MAX_BYTES = 20 * 10**6
TEXTS = {
    "python": (
        "def parse(self, line):\n    if not line:\n        return None\n    for name, value in self.items():\n",
        "class Handler(object):\n    def __init__(self, name, level=0):\n        self.name = name\n        self.level = level\n",
        "import os\nimport sys\n\ndef main(args=None):\n    parser = ArgumentParser()\n    return parser.parse_args(args)\n",
    ),
    "english": (
        "This module provides an interface to the underlying operating system. It returns the name of the file that was ",
        "If the optional argument is given, the method raises an exception when the value is not found in the list. The ",
        "The following functions are useful when you want to read the contents of a directory, and they can be used with ",
    ),
    "c": (
        "#ifndef Py_OBJECT_H\n#define Py_OBJECT_H\n#ifdef __cplusplus\nextern \"C\" {\n#endif\n\ntypedef struct {\n    PyObject *",
        "PyAPI_FUNC(PyObject *) PyList_New(Py_ssize_t size);\nPyAPI_FUNC(int) PyList_SetItem(PyObject *, Py_ssize_t, PyObject *);\n",
        "static inline void _Py_DECREF(PyObject *op)\n{\n    if (--op->ob_refcnt != 0) {\n        return;\n    }\n",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.read(bundled_model.path())


def test_it_is_a_deepseek_v2_with_device_limited_routing_and_fits_the_package() -> None:
    config = Checkpoint.open(bundled_model.path()).model_config()
    gate = config.decoder.gate
    assert config.model_type == "deepseek_v2"
    assert gate.is_group_limited
    assert 1 < gate.topk_group < gate.n_group
    assert config.decoder.mla.q_lora_rank
    assert config.decoder.rotary.yarn
    assert (bundled_model.path() / "model.safetensors").stat().st_size <= MAX_BYTES


def test_its_logits_are_those_of_transformers(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode_text("".join(itertools.chain(*TEXTS.values())))
    expected = Reference(bundled_model.path()).logits(token_ids)
    model = AutoModelForCausalLM.from_pretrained(bundled_model.path(), dtype=torch.float32)
    with torch.inference_mode():
        theirs = model(torch.tensor([token_ids])).logits[0]
    runner = StepRunner(bundled_model.path())
    sequence = runner.sequence(token_ids)
    runner.step([(sequence, len(token_ids))])
    assert relative_error(theirs, expected) < 1e-4
    assert relative_error(sequence.logits[0], expected) < 1e-4


@pytest.mark.parametrize("kind", TEXTS)
def test_it_predicts_text_far_better_than_chance(tokenizer: Tokenizer, kind: str) -> None:
    reference = Reference(bundled_model.path())
    losses = []
    for text in TEXTS[kind]:
        token_ids = tokenizer.encode_text(text)
        logits = reference.logits(token_ids)[:-1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(token_ids[1:])))
    chance = torch.tensor(float(reference.config.decoder.vocab_size)).log()
    assert torch.stack(losses).mean() < 0.6 * chance


def test_kinds_of_text_use_different_experts(tokenizer: Tokenizer) -> None:
    """Two kinds are further apart than two texts of one kind: the gate has learned what it reads."""
    loads = {kind: [last_layer_load(tokenizer.encode_text(text)) for text in texts] for kind, texts in TEXTS.items()}
    within = [distance(a, b) for texts in loads.values() for a, b in itertools.combinations(texts, 2)]
    between = [distance(a, b) for one, other in itertools.combinations(loads.values(), 2) for a in one for b in other]
    assert sum(between) / len(between) > 1.15 * sum(within) / len(within)


def last_layer_load(token_ids: list[int]) -> Tensor:
    """[n_routed_experts], the share of the last layer's assignments that each expert gets."""
    runner = StepRunner(bundled_model.path())
    chosen: list[Tensor] = []
    dispatcher = runner.decoder._dispatcher
    dispatch = dispatcher.dispatch

    def note(layer_id: int, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        chosen.append(topk_ids)
        return dispatch(layer_id, hidden_states, topk_weights, topk_ids)  # type: ignore[no-any-return]

    dispatcher.dispatch = note  # type: ignore[method-assign]
    sequence = runner.sequence(token_ids)
    runner.step([(sequence, len(token_ids))])
    counts = chosen[-1].flatten().bincount(minlength=runner.config.gate.n_routed_experts).float()
    return counts / counts.sum()


def distance(one: Tensor, other: Tensor) -> float:
    """Total variation."""
    return float((one - other).abs().sum()) / 2
