"""How far a checkpoint's answers are from another's on the same text: what quantisation costs.

Both models see the true text before every position (teacher forcing), so that one early difference does not make every
later position differ. They run one after the other: memory holds one model, a temporary file the first one's logits.
"""

import os
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attention.tokenizer import BadTokenizer, Tokenizer
from cluster.bundled_model.corpus import Document, Kind
from cluster.config import DTypeName, MobulaConfig, parse_config
from cluster.roles.preflight import ServedModel, check, open_model
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
    doubts: tuple[str, ...] = ()  # why the two may not be of one model


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A checkpoint that can be compared with, and what both will read."""

    location: str
    dtype: DTypeName  # in which both are computed
    model_type: str
    vocab_size: int
    text: str
    token_ids: tuple[int, ...]
    windows: tuple[tuple[int, ...], ...]

    @classmethod
    def open(cls, location: str, text: str | None, max_tokens: int) -> "Reference":
        """Finds out all that can be without running it. location, text: see compare. Raises what compare raises."""
        model = open_model(_config(location, DTypeName.FLOAT32))
        if model.config.dtype is not torch.float16:
            model = open_model(_config(location, DTypeName.AUTO))
        dtype = DTypeName(str(model.dtype).removeprefix("torch."))
        if text is None:
            text = held_out_text(max_tokens * BYTES_PER_TOKEN)
        token_ids = _token_ids(model, text, max_tokens)
        check(_config(location, dtype))
        reference = cls(
            location=location,
            dtype=dtype,
            model_type=model.config.model_type,
            vocab_size=model.config.decoder.vocab_size,
            text=text,
            token_ids=token_ids,
            windows=_windows(token_ids),
        )
        with reference.reserved():
            return reference

    @contextmanager
    def reserved(self) -> Iterator[BufferedRandom]:
        """A file for the logits of all windows, with room for them. It has no name, so nothing is left of it, however
        the process ends. Raises CannotCompare.
        """
        num_bytes = 4 * sum(map(len, self.windows)) * self.vocab_size
        with tempfile.TemporaryFile(prefix="mobula-") as file:
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, num_bytes)
            except OSError as error:
                raise CannotCompare(
                    f"{tempfile.gettempdir()} has no room for the reference's logits, {num_bytes:,} bytes "
                    f"({error.strerror}); set TMPDIR to another folder, or lower --max-tokens"
                ) from error
            yield file


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
    base = Reference.open(reference, text, max_tokens)
    doubts = _doubts(base, candidate, max_tokens)
    with base.reserved() as file:
        for rows in _logits(reference, "reference", base, on_progress):
            file.write(rows.numpy().data)
        file.seek(0)
        measurement = _Measurement()
        candidate_rows = _logits(candidate, "candidate", base, on_progress)
        for window, rows in zip(base.windows, candidate_rows, strict=True):
            kept = torch.empty_like(rows)
            file.readinto(kept.numpy().data)
            measurement.add(kept, rows, torch.tensor(window))
        return measurement.result(doubts)


def _doubts(reference: Reference, candidate: str, max_tokens: int) -> tuple[str, ...]:
    """Raises CannotCompare where the two can be of no one model."""
    model = open_model(_config(candidate, reference.dtype))
    location, vocab_size = reference.location, model.config.decoder.vocab_size
    if reference.vocab_size != vocab_size:
        raise CannotCompare(
            f"{location} has {reference.vocab_size} tokens, {candidate} has {vocab_size}: they are not of one model"
        )
    doubts = []
    if model.config.model_type != reference.model_type:
        doubts.append(f"model_type of {location} is {reference.model_type}, of {candidate} {model.config.model_type}")
    if _token_ids(model, reference.text, max_tokens) != reference.token_ids:
        doubts.append(f"the tokenizers of {location} and {candidate} read the text as different tokens")
    return tuple(doubts)


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

    def result(self, doubts: tuple[str, ...] = ()) -> Accuracy:
        errors = torch.cat(self._errors)
        reference, candidate = (float(np.exp(loss / self._num_targets)) for loss in self._losses)
        return Accuracy(
            num_tokens=len(errors),
            reference_perplexity=reference,
            candidate_perplexity=candidate,
            greedy_agreement=self._num_agreed / len(errors),
            median_logit_error=float(errors.median()),
            max_logit_error=float(errors.max()),
            doubts=doubts,
        )


def _logits(
    location: str, role: str, reference: Reference, on_progress: Callable[[str, float], None]
) -> Iterator[Tensor]:
    """Of each of the reference's windows: [num_tokens, vocab_size] fp32. role: what progress and errors call it."""
    on_progress(f"reading the {role}", 0.0)
    with SingleProcess(_config(location, reference.dtype)) as process:
        for number, window in enumerate(reference.windows, start=1):
            logits = process.logits(window).cpu().contiguous()
            if not bool(logits.isfinite().all()):  # NaN has no largest logit, and would look like agreement
                raise CannotCompare(
                    f"the {role}, {location}, gives logits that are NaN or infinite: its weights are broken, or too "
                    f"large for {reference.dtype.value}"
                )
            yield logits
            on_progress(f"running the {role}", number / len(reference.windows))


def _token_ids(model: ServedModel, text: str, max_tokens: int) -> tuple[int, ...]:
    try:
        return tuple(Tokenizer.read(model.tokenizer_folder()).encode_text(text)[:max_tokens])
    except BadTokenizer as error:
        raise CannotCompare(str(error)) from error


def _windows(token_ids: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    windows = [tuple(token_ids[start : start + WINDOW_TOKENS]) for start in range(0, len(token_ids), WINDOW_TOKENS)]
    windows = [window for window in windows if len(window) > 1]  # the first token of a window is not predicted
    if not windows:
        there_are = f"{len(token_ids)} token{'s' * (len(token_ids) != 1)}"
        raise CannotCompare(f"the text has {there_are}, at least 2 are needed; give a longer one")
    return tuple(windows)


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
