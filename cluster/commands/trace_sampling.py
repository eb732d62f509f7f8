"""Records a trace from a running system: asks it again and again which experts its workers' tokens chose.

The system keeps choices only while it is asked, and a bounded number of them; under more traffic than fits it is a
sample of whole micro-batches. What arrives goes to the file at once.
"""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import grpc
import numpy as np

from cluster.client import AdminClient
from cluster.commands.trace_requests import OnProgress, Recording
from protos import admin_pb2
from router.trace.header_json import header_from_json
from router.trace.trace import ExpertIds, TraceError, TraceHeader, TraceWindow, id_dtype
from router.trace.trace_file import TraceWriter

ASK_INTERVAL_S = 0.5
AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
AWAY_S = 10.0  # a system that answers nothing for so long is not waited for; what was sampled is kept


def sample(
    client: AdminClient,
    path: Path,
    *,
    max_tokens: int,
    max_seconds: float,
    on_progress: OnProgress = lambda stage, num_tokens: None,
    sleep: Callable[[float], None] = time.sleep,
) -> Recording:
    """Until there are so many tokens or so many seconds have passed, or Ctrl-C.

    A window's label is its worker. Raises TraceError when there was no traffic, OSError, grpc.RpcError.
    """
    first = client.sample_choices()
    model = header_from_json(first.header_json).model
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    header = TraceHeader(model=model, source=f"traffic of {client.address}", started_at=started_at)
    counts: dict[str, int] = {}
    started_s = asked_s = answered_s = time.monotonic()
    was_interrupted = False
    with TraceWriter(path, header) as writer:
        try:
            while writer.num_tokens < max_tokens and (now_s := time.monotonic()) - started_s < max_seconds:
                on_progress("sampling", writer.num_tokens)
                try:
                    sampled = client.sample_choices().choices
                    answered_s = now_s
                except grpc.RpcError as error:
                    is_away = now_s - answered_s > AWAY_S
                    if error.code() not in AWAY or (is_away and not writer.num_tokens):
                        raise
                    if is_away:
                        was_interrupted = True
                        break
                    sleep(ASK_INTERVAL_S)  # workers keep what they sample while the controller is away
                    continue
                for choices in sampled:
                    window = TraceWindow(
                        topk_ids=_topk_ids(choices, header)[:, : max_tokens - writer.num_tokens],
                        start_s=asked_s - started_s,
                        seconds=now_s - asked_s,
                        label=f"worker-{choices.dp_rank}",
                    )
                    writer.add(window)
                    counts[window.label] = counts.get(window.label, 0) + window.num_tokens
                asked_s = now_s
                sleep(ASK_INTERVAL_S)
        except KeyboardInterrupt:
            was_interrupted = True
        if not writer.num_tokens:
            raise TraceError("no token was computed meanwhile: record while requests run")
    return Recording(
        num_tokens_by_label=counts,
        seconds=time.monotonic() - started_s,
        num_bytes=path.stat().st_size,
        was_interrupted=was_interrupted,
    )


def _topk_ids(choices: admin_pb2.WorkerChoices, header: TraceHeader) -> ExpertIds:
    """Raises TraceError for bytes that are not whole tokens; the writer checks the ids."""
    model = header.model
    dtype = id_dtype(model.gate.n_routed_experts).newbyteorder("<")
    shape = (model.num_moe_layers, choices.num_tokens, model.top_k)
    if len(choices.topk_ids) != int(np.prod(shape)) * dtype.itemsize:
        raise TraceError(f"{len(choices.topk_ids)} bytes are not the choices of {choices.num_tokens} tokens")
    return np.frombuffer(choices.topk_ids, dtype).reshape(shape).astype(dtype.newbyteorder("="))
