"""A shard: placement units, and the forwards through them. A plain class; knows nothing of gRPC or Ray.

A forward's life:
1. `forward` (the event loop's thread, or any) reads the frame's header and checks what it asks.
2. It waits in the batcher, with the weights of the version that it named.
3. The compute thread merges it with what else waits for its layer, computes, and counts the load.
4. Its partial sums become the answer's frame; whatever went wrong becomes an answer that says so.
"""

import time
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from experts.batcher import Batcher, ForwardOutput
from experts.expert_load import ExpertLoad, LoadSnapshot
from experts.forward_frame import answer_frame, error_frame, read_forward
from experts.grouped_ffn import ForwardInput, grouped_ffn, merge
from experts.metrics import ShardMetrics
from experts.weight_store import ExpertModel, LayerWeights, Unit, WeightReader, WeightStore
from protos import expert_pb2
from protos.codec import decode_frame
from protos.errors import InternalError, InvalidRequest, MobulaError


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardConfig:
    """One shard's settings."""

    ep_rank: int
    max_waiting_forwards: int = 1024  # more are refused with RESOURCE_EXHAUSTED; workers retry


class ExpertShard:
    """`forward` and the snapshots may be called from any thread; placements change from one control thread."""

    def __init__(self, config: ShardConfig, model: ExpertModel, reader: WeightReader, metrics: ShardMetrics) -> None:
        self._config = config
        self._model = model
        self._store = WeightStore(model, reader)
        self._load = ExpertLoad(model.moe_layer_ids, model.n_routed_experts)
        self._metrics = metrics
        self._batcher = Batcher(self._compute, config.max_waiting_forwards)

    @property
    def ep_rank(self) -> int:
        return self._config.ep_rank

    @property
    def moe_layer_ids(self) -> tuple[int, ...]:
        """The layers in the order of a load snapshot's rows."""
        return self._model.moe_layer_ids

    @property
    def num_units(self) -> int:
        return self._store.num_units

    @property
    def weight_bytes(self) -> int:
        return self._store.weight_bytes

    @property
    def num_waiting_forwards(self) -> int:
        """Admitted and not yet being computed."""
        return self._batcher.num_waiting

    @property
    def placement_versions(self) -> tuple[int, ...]:
        """Served, ascending."""
        return self._store.versions

    def start(self) -> None:
        """Starts computing."""
        self._batcher.start()

    def stop(self) -> None:
        """Computes what waits, refuses what comes (UNAVAILABLE), ends the compute thread."""
        self._batcher.stop()

    def stage(self, units: Iterable[Unit]) -> None:
        """Reads the units' weights while the versions served go on. Raises WeightShapeError."""
        self._store.stage(units)
        self._show_weights()

    def activate(self, placement_version: int, units: Iterable[Unit]) -> None:
        """Serves `units` under `placement_version`, beside the versions served before; reads what is not staged."""
        self._store.activate(placement_version, units)
        self._show_weights()

    def release(self, placement_version: int) -> None:
        """Serves a version no longer; forwards that were admitted under it are still answered."""
        self._store.release(placement_version)
        self._show_weights()

    def forward(self, frame: bytes) -> Future[bytes]:
        """The answer to a ForwardRequest frame, which may be an error's.

        Cancelling the future drops the forward if it still waits. Raises InvalidRequest for bytes that are no
        ForwardRequest, to which no answer can be given.
        """
        header, payload = decode_frame(expert_pb2.ForwardHeader, frame)
        answer: Future[bytes] = Future()
        try:
            layer = self._store.layer(header.placement_version, header.layer_id)
            if layer is None:
                raise InvalidRequest(
                    f"layer {header.layer_id} has no routed experts, only layers {list(self._model.moe_layer_ids)} do",
                    field="header.layer_id",
                )
            output = self._batcher.submit(layer, read_forward(header, payload, self._model, layer))
        except MobulaError as error:
            answer.set_result(error_frame(header.sequence_number, error))
            return answer
        answer.add_done_callback(lambda _: output.cancel())  # does nothing to an output that is there
        output.add_done_callback(lambda _: self._answer(header.sequence_number, output, answer))
        return answer

    def load(self) -> LoadSnapshot:
        """Counted load since the shard started."""
        return self._load.snapshot()

    @torch.inference_mode()
    def _compute(self, layer: LayerWeights, forwards: list[ForwardInput]) -> Tensor:
        started_s = time.perf_counter()
        merged = merge(forwards)
        sums = grouped_ffn(merged, layer.experts)
        self._load.count(layer.layer_id, len(forwards), merged)
        self._metrics.compute_seconds.observe(time.perf_counter() - started_s)
        self._metrics.batched_calls.observe(len(forwards))
        self._metrics.forwards.inc(len(forwards))
        self._metrics.rows.inc(merged.num_rows)
        self._metrics.assignments.inc(merged.num_assignments)
        return sums

    def _answer(self, sequence_number: int, output: Future[ForwardOutput], answer: Future[bytes]) -> None:
        """In the compute thread, or in the thread that cancelled."""
        if output.cancelled() or not answer.set_running_or_notify_cancel():
            return
        error = output.exception()
        if error is None:
            result = output.result()
            self._metrics.queue_seconds.observe(result.queue_ns / 1e9)
            answer.set_result(answer_frame(sequence_number, result))
        else:
            refusal = error if isinstance(error, MobulaError) else InternalError(str(error))
            answer.set_result(error_frame(sequence_number, refusal))

    def _show_weights(self) -> None:
        self._metrics.weight_bytes.set(self._store.weight_bytes)
        self._metrics.units.set(self._store.num_units)
