"""Records which experts a model's tokens choose, in one process without Ray: the gate's own answers, on real text.

The life of a recording:
1. Requests come one after the other: a text to read, or a prompt to read and to continue.
2. The decoder runs as it is served; what it dispatches passes a RecordingDispatcher, which keeps the expert ids.
3. Each request becomes a window of the trace, labelled with its kind.
4. It ends after so many tokens, so many seconds, or with Ctrl-C; what was recorded until then is kept.
"""

import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from attention.decoder import ExpertDispatcher
from attention.sampling_params import SamplingParams
from attention.tokenizer import Tokenizer
from cluster.bundled_model.corpus import Kind, collect
from cluster.config import MobulaConfig, parse_config
from cluster.model_shapes import model_shape
from cluster.preflight import open_model
from cluster.single_process import SingleProcess
from router.trace.model_shape import ModelShape
from router.trace.trace import ExpertIds, TraceError, TraceHeader, TraceWindow, id_dtype
from router.trace.trace_file import TraceWriter

TEXT_TOKENS = 256  # of a request that is only read
NEW_TOKENS = 256  # of a prompt that is continued, at most
TEMPERATURE = 0.6  # of continuations: greedy ones repeat themselves
OnProgress = Callable[[str, int], None]  # what is being done, and the tokens recorded so far


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
class _Request:
    label: str
    token_ids: list[int]
    num_new_tokens: int = 0
    seed: int = 0


class RecordingDispatcher:
    """Keeps the expert ids of what passes; see attention.decoder.ExpertDispatcher."""

    def __init__(self, dispatcher: ExpertDispatcher, model: ModelShape) -> None:
        self._dispatcher = dispatcher
        self._chosen: dict[int, list[ExpertIds]] = {layer_id: [] for layer_id in model.moe_layer_ids}
        self._dtype = id_dtype(model.gate.n_routed_experts)

    def dispatch(self, layer_id: int, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Any:
        """Rows of micro-batches come in the same order in every layer."""
        self._chosen[layer_id].append(topk_ids.cpu().numpy().astype(self._dtype))
        return self._dispatcher.dispatch(layer_id, hidden_states, topk_weights, topk_ids)

    def combine(self, handle: Any) -> Tensor:
        return self._dispatcher.combine(handle)

    def abandon(self, handle: Any) -> None:
        self._dispatcher.abandon(handle)

    def take(self) -> ExpertIds:
        """[num_moe_layers, num_tokens, top_k] since the last call; a token that not every layer saw is left out."""
        layers = [np.concatenate(parts) for parts in self._chosen.values()]
        num_tokens = min(len(ids) for ids in layers)
        for parts in self._chosen.values():
            parts.clear()
        return np.stack([ids[:num_tokens] for ids in layers])


def record(config: RecordingConfig, path: Path, on_progress: OnProgress = lambda stage, num_tokens: None) -> Recording:
    """Writes the trace to `path`. Raises TraceError, OSError and what cluster.preflight.check raises."""
    on_progress("reading the model", 0)
    served = open_model(parse_config({"model": config.model}))
    shape = model_shape(config.model, served.config, served.dtype.itemsize)
    tokenizer = Tokenizer.read(served.tokenizer_folder())
    prompts = _prompts(config, tokenizer, served.config.decoder.max_position_embeddings)
    max_model_len = max(TEXT_TOKENS, *(len(prompt) + NEW_TOKENS + 1 for prompt in prompts), 0)
    settings = _one_process(config.model, min(max_model_len, served.config.decoder.max_position_embeddings))
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    header = TraceHeader(model=shape, source=_source(config), seed=config.seed, started_at=started_at)
    recorders: list[RecordingDispatcher] = []

    def wrap(dispatcher: ExpertDispatcher) -> ExpertDispatcher:
        recorders.append(RecordingDispatcher(dispatcher, shape))
        return recorders[0]

    counts: dict[str, int] = {}
    was_interrupted = False
    with SingleProcess(settings, wrap) as process, TraceWriter(path, header) as writer:
        started_s = now_s = time.monotonic()
        continued = _continued(prompts, process.plan.max_model_len, config.seed)
        try:
            for request in continued if prompts else _read(config, tokenizer, process.plan.max_model_len, on_progress):
                first_s = time.monotonic()
                if not counts:
                    started_s = first_s  # collecting text is no part of it
                give_up_at_s = started_s + (config.max_seconds or float("inf"))
                num_left = config.max_tokens - writer.num_tokens
                for num_new in _run(process, request, num_left, give_up_at_s):
                    on_progress(request.label, writer.num_tokens + num_new)
                now_s = time.monotonic()
                window = TraceWindow(
                    topk_ids=recorders[0].take()[:, :num_left],
                    start_s=first_s - started_s,
                    seconds=now_s - first_s,
                    label=request.label,
                )
                writer.add(window)
                counts[request.label] = counts.get(request.label, 0) + window.num_tokens
                if writer.num_tokens >= config.max_tokens or now_s >= give_up_at_s:
                    break
        except KeyboardInterrupt:
            was_interrupted = True
        if not writer.num_tokens:
            raise TraceError("not one token was recorded: give it more time, or a text that is not empty")
    return Recording(
        num_tokens_by_label=counts,
        seconds=now_s - started_s,
        num_bytes=path.stat().st_size,
        was_interrupted=was_interrupted,
    )


def _run(process: SingleProcess, request: _Request, num_left: int, give_up_at_s: float) -> Iterator[int]:
    """Reads the request's text and continues it, or only reads it; tells how many tokens are done."""
    token_ids = request.token_ids[:num_left]
    if not request.num_new_tokens or len(token_ids) == num_left:
        process.logits(token_ids)
        yield len(token_ids)
        return
    # The last token that is sampled is not computed any more, so one more than is wanted.
    num_new = min(request.num_new_tokens, num_left - len(token_ids)) + 1
    params = SamplingParams(temperature=TEMPERATURE, seed=request.seed, max_tokens=num_new, ignore_eos=True)
    for position, _ in enumerate(process.generate(token_ids, num_new, params)):
        yield len(token_ids) + position
        if time.monotonic() >= give_up_at_s:
            return


def _read(
    config: RecordingConfig, tokenizer: Tokenizer, max_model_len: int, on_progress: OnProgress
) -> Iterator[_Request]:
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
        yield _Request(label=label, token_ids=piece)


def _continued(prompts: list[list[int]], max_model_len: int, seed: int) -> Iterator[_Request]:
    """Each prompt in turn, without end, every round with a seed of its own."""
    for round_seed in itertools.count(seed):
        for number, token_ids in enumerate(prompts, start=1):
            num_new_tokens = min(NEW_TOKENS, max_model_len - 1 - len(token_ids))
            yield _Request(
                label=f"prompt {number}", token_ids=token_ids, num_new_tokens=num_new_tokens, seed=round_seed
            )


def _prompts(config: RecordingConfig, tokenizer: Tokenizer, max_position_embeddings: int) -> list[list[int]]:
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


def _source(config: RecordingConfig) -> str:
    if config.prompts:
        return f"{config.model}, {len(config.prompts)} prompts continued at temperature {TEMPERATURE}"
    labels = ", ".join(config.texts) if config.texts else ", ".join(Kind)
    return f"{config.model}, reading {labels}"[:1000]


def _one_process(model: str, max_model_len: int) -> MobulaConfig:
    """One shard with all cores and a cache that holds a request."""
    num_threads = min(1024, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    engine = {"max_num_seqs": 1, "max_num_batched_tokens": TEXT_TOKENS, "max_model_len": max_model_len}
    return parse_config(
        {
            "model": model,
            "attention_workers": {"count": 1, "num_threads": num_threads, "engine": engine},
            "expert_shards": {"count": 1, "num_threads": num_threads},
        }
    )
