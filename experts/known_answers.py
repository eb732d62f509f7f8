"""What each expert makes of one fixed row: taken when its weights are new, asked again while the shard has time.

Weights that change in memory, a kernel that no longer computes what it did, a table that points elsewhere: the answer
has other bits then, and the unit is not to be used. Knows nothing of forwards or of what follows.
"""

import threading
import zlib
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch

from experts.grouped_ffn import ExpertWeights, ForwardInput
from experts.kernels.expert_set import ExpertSet, PackedExpert
from experts.weight_store import Expert, ExpertModel, LayerWeights
from protos.codec import raw_bytes
from protos.memory import Matrix, as_tensor

SEED = 0

Experts = Mapping[int, ExpertWeights] | ExpertSet


class KnownAnswers:
    """Of all experts that a shard ever held; an expert that is read again must answer as before."""

    def __init__(self, model: ExpertModel, ffn: Callable[..., Matrix]) -> None:
        """ffn: as grouped_ffn; asked anew for each answer."""
        self._ffn = ffn
        self._intermediate_size = model.moe_intermediate_size
        generator = torch.Generator().manual_seed(SEED)
        self._row = torch.randn(1, model.hidden_size, generator=generator).to(model.dtype)
        self._answers: dict[tuple[int, int], int] = {}
        self._lock = threading.Lock()

    def note(self, layer_id: int, expert_id: int, expert: Expert) -> None:
        """The answer of an expert whose weights were just read, unless it is known."""
        if (layer_id, expert_id) in self._answers:
            return
        experts: Experts = {expert_id: expert} if isinstance(expert, ExpertWeights) else self._set(expert_id, expert)
        answer = self._answer(experts, expert_id)
        with self._lock:
            self._answers[layer_id, expert_id] = answer

    def forget(self, layer_id: int, expert_id: int) -> None:
        """What an expert answered; the next reading is believed."""
        with self._lock:
            del self._answers[layer_id, expert_id]

    def of(self, experts: Iterable[tuple[int, int]]) -> dict[tuple[int, int], int]:
        """The answers that are known of these, by (layer_id, expert_id)."""
        with self._lock:
            return {key: self._answers[key] for key in experts if key in self._answers}

    def fault(self, layer: LayerWeights, expert_id: int) -> str | None:
        """How an expert that is served differs from what it was; None if it does not."""
        known, found = self._answers.get((layer.layer_id, expert_id)), self._answer(layer.experts, expert_id)
        if known is None or found == known:  # not known: being read again
            return None
        return f"expert {expert_id} gives {found:#010x} for the fixed row, it gave {known:#010x} when it was read"

    def _answer(self, experts: Experts, expert_id: int) -> int:
        """CRC-32 of the answer's bytes."""
        assignments = np.zeros((4, 1), dtype=np.int32)
        assignments[0].view(np.float32)[0] = 1.0
        assignments[2] = expert_id
        forward = ForwardInput(hidden_states=self._row, assignment_bytes=assignments.tobytes(), num_partial_sums=1)
        return zlib.crc32(raw_bytes(as_tensor(self._ffn(forward, experts, None))))

    def _set(self, expert_id: int, expert: PackedExpert) -> ExpertSet:
        return ExpertSet({expert_id: expert}, self._intermediate_size)
