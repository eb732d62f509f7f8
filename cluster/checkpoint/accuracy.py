"""How far a checkpoint's answers are from another's on the same text: what quantisation costs.

Both models see the true text before every position (teacher forcing), so that one early difference does not make every
later position differ. They run one after the other: memory holds one model, a temporary file the first one's logits.
"""

import os
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attention.tokenizer import Tokenizer
from cluster.bundled_model.corpus import Document, Kind
from cluster.config import DTypeName, MobulaConfig, parse_config
from cluster.roles.preflight import open_model
from cluster.roles.single_process import SingleProcess

WINDOW_TOKENS = 512  # context at most; each window begins anew
DEFAULT_TOKENS = 4096
BYTES_PER_TOKEN = 8  # more than a token has on average: how much text is worth reading
FALLBACK_TEXT = """\
The library is a place where books are kept so that people can read them. A reader who looks for a book first asks the
catalogue, which says on which shelf the book stands. If another reader has taken it, the catalogue says when it will
be back. In a large library the shelves are in many rooms, and somebody has to walk to the right one. It would be slow
to walk to every room for every question, so the catalogue also says which rooms need not be visited at all.
"""


class CannotCompare(Exception):
    """Two checkpoints or a text that cannot be compared; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """A candidate against a reference.

    A position's logit error is the largest difference of its logits over the reference's largest absolute logit there.
    """

    num_tokens: int  # positions that were compared
    reference_perplexity: float
    candidate_perplexity: float
    greedy_agreement: float  # share of positions at which both would choose the same token
    median_logit_error: float
    max_logit_error: float


def held_out_text(num_bytes: int) -> str:
    """Sources of Python's standard library that the bundled model was not trained on; a paragraph if there are none."""
    library = Path(sysconfig.get_path("stdlib"))
    texts: list[str] = []
    for path in sorted(library.glob("*.py")):
        document = Document(kind=Kind.PYTHON, source=path.name, text=path.read_text(encoding="utf-8", errors="replace"))
        if document.is_held_out:
            texts.append(document.text)
        if sum(map(len, texts)) >= num_bytes:
            break
    return "\n".join(texts) or FALLBACK_TEXT


def compare(
    reference: str,
    candidate: str,
    *,
    text: str | None = None,
    max_tokens: int = DEFAULT_TOKENS,
    on_progress: Callable[[str, float], None] = lambda stage, fraction: None,
) -> Accuracy:
    """reference, candidate: folders, Hugging Face ids or "bundled". text: None for held_out_text.

    on_progress is told what is being done and how much of it is. Both are computed in the dtype in which the reference
    is served, or in float32 where nothing is served in its own. Raises CannotCompare and what
    cluster.roles.preflight.check raises.
    """
    model = open_model(_config(reference, DTypeName.FLOAT32))
    if model.config.dtype is not torch.float16:
        model = open_model(_config(reference, DTypeName.AUTO))
    dtype = DTypeName(str(model.dtype).removeprefix("torch."))
    vocab_size = model.config.decoder.vocab_size
    other_size = open_model(_config(candidate, dtype)).config.decoder.vocab_size
    if vocab_size != other_size:
        raise CannotCompare(
            f"{reference} has {vocab_size} tokens, {candidate} has {other_size}: they are not of one model"
        )
    if text is None:
        text = held_out_text(max_tokens * BYTES_PER_TOKEN)
    windows = _windows(Tokenizer.read(model.tokenizer_folder()).encode_text(text)[:max_tokens])
    with tempfile.TemporaryDirectory(prefix="mobula-") as folder:
        shape = (sum(map(len, windows)), vocab_size)
        kept = np.memmap(Path(folder) / "logits", dtype=np.float32, mode="w+", shape=shape)
        start = 0
        for rows in _logits(_config(reference, dtype), windows, "reference", on_progress):
            kept[start : start + len(rows)] = rows.numpy()
            start += len(rows)
        measurement = _Measurement()
        start = 0
        candidate_rows = _logits(_config(candidate, dtype), windows, "candidate", on_progress)
        for window, rows in zip(windows, candidate_rows, strict=True):
            measurement.add(torch.from_numpy(kept[start : start + len(rows)].copy()), rows, torch.tensor(window))
            start += len(rows)
        return measurement.result()


class _Measurement:
    """Sums and errors over the windows."""

    def __init__(self) -> None:
        self._losses = [0.0, 0.0]  # of reference and candidate, nats
        self._num_targets = 0
        self._num_agreed = 0
        self._errors: list[Tensor] = []

    def add(self, reference: Tensor, candidate: Tensor, token_ids: Tensor) -> None:
        """reference, candidate: [num_tokens, vocab_size] fp32; token_ids: [num_tokens], what was read."""
        for index, logits in enumerate((reference, candidate)):
            loss = F.cross_entropy(logits[:-1], token_ids[1:], reduction="sum")
            self._losses[index] += float(loss)
        self._num_targets += len(token_ids) - 1
        self._num_agreed += int((reference.argmax(dim=-1) == candidate.argmax(dim=-1)).sum())
        largest = reference.abs().amax(dim=-1)  # [num_tokens]
        self._errors.append((candidate - reference).abs().amax(dim=-1) / largest)

    def result(self) -> Accuracy:
        errors = torch.cat(self._errors)
        reference, candidate = (float(np.exp(loss / self._num_targets)) for loss in self._losses)
        return Accuracy(
            num_tokens=len(errors),
            reference_perplexity=reference,
            candidate_perplexity=candidate,
            greedy_agreement=self._num_agreed / len(errors),
            median_logit_error=float(errors.median()),
            max_logit_error=float(errors.max()),
        )


def _logits(
    config: MobulaConfig,
    windows: Sequence[Sequence[int]],
    stage: str,
    on_progress: Callable[[str, float], None],
) -> Iterator[Tensor]:
    """Of each window: [num_tokens, vocab_size] fp32."""
    on_progress(f"reading the {stage}", 0.0)
    with SingleProcess(config) as process:
        for number, window in enumerate(windows, start=1):
            yield process.logits(window).cpu()
            on_progress(f"running the {stage}", number / len(windows))


def _windows(token_ids: list[int]) -> list[list[int]]:
    windows = [token_ids[start : start + WINDOW_TOKENS] for start in range(0, len(token_ids), WINDOW_TOKENS)]
    windows = [window for window in windows if len(window) > 1]  # the first token of a window is not predicted
    if not windows:
        raise CannotCompare(f"the text has {len(token_ids)} tokens, at least 2 are needed; give a longer one")
    return windows


def _config(model: str, dtype: DTypeName) -> MobulaConfig:
    """One process with all cores and a cache that holds a window."""
    num_threads = min(1024, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    engine = {"max_num_seqs": 1, "max_model_len": WINDOW_TOKENS, "max_num_batched_tokens": WINDOW_TOKENS}
    return parse_config(
        {
            "model": model,
            "dtype": dtype.value,
            "attention_workers": {"count": 1, "num_threads": num_threads, "engine": engine},
            "expert_shards": {"count": 1, "num_threads": num_threads},
        }
    )
