"""Records which experts a model's tokens choose, in one process without Ray: the gate's own answers, on real text.

The life of a recording:
1. Requests come one after the other (trace_requests.py): a text to read, or a prompt to read and to continue.
2. The decoder runs as it is served; what it dispatches passes a RecordingDispatcher, which keeps the expert ids.
3. Each request becomes a window of the trace, labelled with its kind.
4. It ends after so many tokens, so many seconds, or with Ctrl-C; the requests that were done until then are kept.
"""

import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from attention.decoder import ExpertDispatcher
from attention.sampling_params import SamplingParams
from attention.tokenizer import Tokenizer
from cluster.checkpoint.model_shapes import model_shape
from cluster.commands.trace_requests import (
    NEW_TOKENS,
    TEMPERATURE,
    TEXT_TOKENS,
    OnProgress,
    Recording,
    RecordingConfig,
    Request,
    continue_prompts,
    describe,
    encode_prompts,
    read_texts,
)
from cluster.config import MobulaConfig, parse_config
from cluster.roles.preflight import open_model
from cluster.roles.single_process import SingleProcess
from router.trace.model_shape import ModelShape
from router.trace.trace import ExpertIds, TraceError, TraceHeader, TraceWindow, id_dtype
from router.trace.trace_file import TraceWriter

MIN_TOKENS = 2  # one to place by, one to score


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
    """Writes the trace to `path`. Raises TraceError, OSError and what cluster.roles.preflight.check raises."""
    on_progress("reading the model", 0)
    served = open_model(parse_config({"model": config.model}))
    shape = model_shape(config.model, served.config, served.dtype.itemsize)
    tokenizer = Tokenizer.read(served.tokenizer_folder())
    max_positions = served.config.decoder.max_position_embeddings
    prompts = encode_prompts(config, tokenizer, max_positions)
    max_model_len = min(max_positions, max(TEXT_TOKENS, *(len(prompt) + NEW_TOKENS + 1 for prompt in prompts), 0))
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    header = TraceHeader(model=shape, source=describe(config), seed=config.seed, started_at=started_at)
    recorders: list[RecordingDispatcher] = []

    def wrap(dispatcher: ExpertDispatcher) -> ExpertDispatcher:
        recorders.append(RecordingDispatcher(dispatcher, shape))
        return recorders[0]

    with SingleProcess(_one_process(config.model, max_model_len), wrap) as process, TraceWriter(path, header) as writer:
        if prompts:
            requests = continue_prompts(prompts, max_model_len, config.seed)
        else:
            requests = read_texts(config, tokenizer, max_model_len, on_progress)
        session = _Session(config, process, recorders[0], writer, on_progress)
        was_interrupted = session.run(requests)
        if writer.num_tokens < MIN_TOKENS:  # a text that is empty has a token that begins it
            found = f"{writer.num_tokens} of the {MIN_TOKENS} tokens that a replay needs were recorded"
            raise TraceError(f"{found}: give it more time, or a text that is not empty")
    return Recording(
        num_tokens_by_label=session.counts,
        seconds=session.seconds,
        num_bytes=path.stat().st_size,
        was_interrupted=was_interrupted,
    )


class _Session:
    """Runs requests until it has enough. counts: tokens by label; seconds: since the first request began."""

    def __init__(
        self,
        config: RecordingConfig,
        process: SingleProcess,
        recorder: RecordingDispatcher,
        writer: TraceWriter,
        on_progress: OnProgress,
    ) -> None:
        self.counts: dict[str, int] = {}
        self.seconds = 0.0
        self._config = config
        self._process = process
        self._recorder = recorder
        self._writer = writer
        self._on_progress = on_progress

    def run(self, requests: Iterator[Request]) -> bool:
        """Whether Ctrl-C ended it."""
        started_s: float | None = None
        try:
            for request in requests:
                first_s = time.monotonic()
                started_s = first_s if started_s is None else started_s  # finding texts is no part of it
                self._record(request, started_s, first_s)
                self.seconds = time.monotonic() - started_s
                if self._num_left <= 0 or self.seconds >= self._max_seconds:
                    break
        except KeyboardInterrupt:
            return True
        return False

    @property
    def _num_left(self) -> int:
        return self._config.max_tokens - self._writer.num_tokens

    @property
    def _max_seconds(self) -> float:
        return float("inf") if self._config.max_seconds is None else self._config.max_seconds

    def _record(self, request: Request, started_s: float, first_s: float) -> None:
        for num_done in _compute(self._process, request, self._num_left):
            self._on_progress(request.label, self._writer.num_tokens + num_done)
            if time.monotonic() - started_s >= self._max_seconds:
                break
        window = TraceWindow(
            topk_ids=self._recorder.take()[:, : self._num_left],
            start_s=first_s - started_s,
            seconds=time.monotonic() - first_s,
            label=request.label,
        )
        self._writer.add(window)
        self.counts[request.label] = self.counts.get(request.label, 0) + window.num_tokens


def _compute(process: SingleProcess, request: Request, num_left: int) -> Iterator[int]:
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
