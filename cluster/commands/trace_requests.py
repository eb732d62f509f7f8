"""What a recording runs: texts that are read, prompts that are continued."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from attention.tokenizer import Tokenizer
from cluster.bundled_model.corpus import Kind, collect
from router.trace.trace import TraceError

TEXT_TOKENS = 256  # of a request that is only read
NEW_TOKENS = 256  # of a prompt that is continued, at most
TEMPERATURE = 0.6  # of continuations: greedy ones repeat themselves
OnProgress = Callable[[str, int], None]  # what is being done, and the tokens recorded so far


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """What was recorded. num_tokens_by_label adds up to all of it."""

    num_tokens_by_label: Mapping[str, int]
    seconds: float
    num_bytes: int  # of the file
    was_interrupted: bool

    @property
    def num_tokens(self) -> int:
        return sum(self.num_tokens_by_label.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordingConfig:
    """What is to be recorded. model: folder, Hugging Face id, or "bundled".

    prompts: continued in turn, again and again with other seeds; texts: read in pieces, by label; without either the
    four kinds of text the bundled model knows are read in turn.
    """

    model: str
    max_tokens: int
    max_seconds: float | None = None  # unset: until max_tokens
    prompts: tuple[str, ...] = ()
    texts: Mapping[str, str] | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sequence; num_new_tokens: 0 to read it only."""

    label: str
    token_ids: list[int]
    num_new_tokens: int = 0
    seed: int = 0


def read_texts(
    config: RecordingConfig, tokenizer: Tokenizer, max_model_len: int, on_progress: OnProgress
) -> Iterator[Request]:
    """Until the last text is read."""
    if config.texts:
        texts = {label: iter([text]) for label, text in config.texts.items()}
    else:
        on_progress("collecting text", 0)
        documents = sorted(collect(seed=config.seed), key=lambda document: not document.is_held_out)
        texts = {kind.value: iter([d.text for d in documents if d.kind is kind]) for kind in Kind}
    pieces = {label: _pieces(texts[label], tokenizer, min(TEXT_TOKENS, max_model_len)) for label in texts}
    num_given = dict.fromkeys(pieces, 0)
    while pieces:
        label = min(pieces, key=lambda name: num_given[name])  # whichever had least, so that all get alike
        piece = next(pieces[label], None)
        if piece is None:
            del pieces[label]
            continue
        num_given[label] += len(piece)
        yield Request(label=label, token_ids=piece)


def continue_prompts(prompts: list[list[int]], max_model_len: int, seed: int) -> Iterator[Request]:
    """Each prompt in turn, without end, every round with a seed of its own."""
    for round_seed in itertools.count(seed):
        for number, token_ids in enumerate(prompts, start=1):
            num_new_tokens = min(NEW_TOKENS, max_model_len - 1 - len(token_ids))
            yield Request(label=f"prompt {number}", token_ids=token_ids, num_new_tokens=num_new_tokens, seed=round_seed)


def encode_prompts(config: RecordingConfig, tokenizer: Tokenizer, max_position_embeddings: int) -> list[list[int]]:
    """Token ids of each. Raises TraceError for one that leaves no room."""
    prompts = [tokenizer.encode_text(prompt) for prompt in config.prompts]
    limit = max_position_embeddings - 2
    for number, token_ids in enumerate(prompts, start=1):
        if not 1 <= len(token_ids) <= limit:
            raise TraceError(f"prompt {number} has {len(token_ids)} tokens, must be 1 to {limit}: shorten it")
    return prompts


def _pieces(texts: Iterator[str], tokenizer: Tokenizer, num_tokens: int) -> Iterator[list[int]]:
    """Each text's tokens, cut into requests."""
    for text in texts:
        token_ids = tokenizer.encode_text(text)
        for start in range(0, len(token_ids), num_tokens):
            yield token_ids[start : start + num_tokens]


def describe(config: RecordingConfig) -> str:
    """The trace's source, for people."""
    if config.prompts:
        return f"{config.model}, {len(config.prompts)} prompts continued at temperature {TEMPERATURE}"
    labels = ", ".join(config.texts) if config.texts else ", ".join(Kind)
    return f"{config.model}, reading {labels}"[:1000]
