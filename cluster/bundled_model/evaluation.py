"""What is measured on held-out text: loss, expert load, and sampled continuations. Modifies no model."""

from itertools import combinations

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from cluster.bundled_model.corpus import Kind
from cluster.bundled_model.tokenizer import EOS_ID
from cluster.bundled_model.training_model import TrainingModel

_SEQUENCES_AT_ONCE = 8

SAMPLE_PROMPTS = (
    (Kind.PYTHON, 'def read_file(path):\n    """Return the contents of the file.'),
    (Kind.PYTHON, "class Queue:\n    def __init__(self, maxsize=0):\n"),
    (Kind.ENGLISH, "The following example shows how to"),
    (Kind.ENGLISH, "This module provides a simple interface to"),
    (Kind.C, "#ifndef Py_LISTOBJECT_H\n#define Py_LISTOBJECT_H\n"),
    (Kind.C, "PyAPI_FUNC(PyObject *) PyDict_"),
    (Kind.CHAT, "User: What does the function os.path.join do?\n\nAssistant:"),
)


@torch.no_grad()
def held_out_loss(model: TrainingModel, packed: dict[Kind, Tensor], max_sequences: int) -> dict[str, float]:
    """Mean cross-entropy in nats per token for each kind, over at most `max_sequences` sequences."""
    losses = {}
    for kind, rows in packed.items():
        chunks = rows[:max_sequences].split(_SEQUENCES_AT_ONCE)
        total = sum(len(c) * F.cross_entropy(model(c[:, :-1])[0].flatten(0, 1), c[:, 1:].flatten()) for c in chunks)
        losses[kind.value] = float(total) / len(rows[:max_sequences])
    return losses


@torch.no_grad()
def expert_load(model: TrainingModel, packed: dict[Kind, Tensor], max_sequences: int) -> dict[str, Tensor]:
    """The share of assignments each expert gets, for each kind: [num_moe_layers, n_routed_experts], rows sum to 1."""
    num_experts = model.config.n_routed_experts
    loads: dict[str, Tensor] = {}
    for kind, rows in packed.items():
        counts = torch.zeros(1, dtype=torch.int64)
        for chunk in rows[:max_sequences].split(_SEQUENCES_AT_ONCE):
            routings = model(chunk[:, :-1])[1]
            counts = counts + torch.stack([r.topk_ids.flatten().bincount(minlength=num_experts) for r in routings])
        loads[kind.value] = counts / counts.sum(dim=1, keepdim=True)
    return loads


def total_variation(loads: dict[str, Tensor], kinds: tuple[Kind, ...]) -> dict[str, list[float]]:
    """Half the L1 distance between two kinds' loads, per MoE layer: 0.0 is the same load, 1.0 is disjoint experts."""
    return {
        f"{a.value}-{b.value}": (0.5 * (loads[a.value] - loads[b.value]).abs().sum(dim=1)).tolist()
        for a, b in combinations(kinds, 2)
    }


def samples(model: TrainingModel, tokenizer: Tokenizer, max_tokens: int = 80) -> list[dict[str, str | float]]:
    """A greedy and a warm continuation of each of SAMPLE_PROMPTS."""
    taken = []
    for kind, prompt in SAMPLE_PROMPTS:
        prompt_ids = tokenizer.encode(prompt).ids
        for temperature in (0.0, 0.7):
            text = tokenizer.decode(continuation(model, prompt_ids, max_tokens, temperature))
            taken.append({"kind": kind.value, "prompt": prompt, "temperature": temperature, "continuation": text})
    return taken


@torch.no_grad()
def continuation(
    model: TrainingModel, prompt_ids: list[int], max_tokens: int, temperature: float = 0.0, seed: int = 0
) -> list[int]:
    """Token ids that follow the prompt, without <eos>; greedy at temperature 0. Recomputes the prefix at each step."""
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt_ids)
    for _ in range(max_tokens):
        logits = model(torch.tensor([ids]))[0][0, -1]
        if temperature == 0.0:
            next_id = int(logits.argmax())
        else:
            next_id = int(torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator))
        if next_id == EOS_ID:
            break
        ids.append(next_id)
    return ids[len(prompt_ids) :]
