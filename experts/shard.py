"""A shard: placement units, and the forwards through them. A plain class; knows nothing of gRPC or Ray.

A forward's life:
1. `submit` (the event loop's thread, the compute thread for a ring, or any) checks what the forward asks.
2. It waits in the batcher, with the weights of the version that it named.
3. The compute thread merges it with what else waits for its layer, and computes.
4. Its partial sums are in the answer's memory, or become the answer's frame; whatever went wrong becomes an answer that
   says so.
5. Once it is answered its load is counted.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass

from experts.batcher import Batcher, ForwardOutput, WaitingForward
from experts.expert_load import ExpertLoad
from experts.forward_frame import answer_frame, answer_matrix, read_forward
from experts.grouped_ffn import grouped_ffn, merge
from experts.known_answers import KnownAnswers
from experts.load_snapshot import LoadSnapshot
from experts.metrics import ShardMetrics
from experts.pacer import Pacer
from experts.self_check import SelfCheck, WrongUnit
from experts.weight_store import CopyExpert, Expert, ExpertModel, Unit, WeightReader, WeightStore
from protos import expert_pb2
from protos.codec import decode_frame
from protos.errors import InvalidRequest, MobulaError, StalePlacement
from protos.memory import Matrix, Memory
from protos.poller import Poller

GroupedFfn = Callable[..., Matrix]  # grouped_ffn and what stands in for it


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardConfig:
    """One shard's settings."""

    ep_rank: int
    max_waiting_forwards: int = 1024  # more are refused with RESOURCE_EXHAUSTED; workers retry
    self_check_interval_s: float | None = None  # between two experts' known answers; None: never asked again
    max_waiting_bytes: int = 2**30  # of frames from streams, the same; rings are the workers' own memory


class ExpertShard:
    """Forwards and snapshots may be asked for from any thread; placements change from one control thread."""

    def __init__(
        self,
        config: ShardConfig,
        model: ExpertModel,
        reader: WeightReader,
        metrics: ShardMetrics,
        ffn: GroupedFfn = grouped_ffn,
        on_wrong: Callable[[], None] = lambda: None,
    ) -> None:
        """ffn: what computes; anything but grouped_ffn is for measuring what is around it.

        on_wrong: told by the compute thread that a unit is quarantined; whoever controls the shard calls `repair` then.
        """
        self._config = config
        self._model = model
        self._store = WeightStore(model, reader)
        self._load = ExpertLoad(model.moe_layer_ids, model.n_routed_experts)
        self._metrics = metrics
        self._ffn = ffn
        known = KnownAnswers(model, lambda *arguments: self._ffn(*arguments))
        self._self_check = SelfCheck(config.ep_rank, self._store, known, metrics, on_wrong)
        self._batcher = Batcher(
            self._compute,
            config.max_waiting_forwards,
            config.max_waiting_bytes,
            count=self._count,
            counting=metrics.counting,
            when_idle=self._check_next,
            idle_interval_s=config.self_check_interval_s,
        )

    @property
    def ep_rank(self) -> int:
        return self._config.ep_rank

    @property
    def model(self) -> ExpertModel:
        """What is served."""
        return self._model

    @property
    def poller(self) -> Poller:
        """Sockets that the compute thread listens to."""
        return self._batcher.poller

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
    def signs_of_life(self) -> int | None:
        """Of the compute thread: a number that changes while it works; None while there is nothing to do."""
        return self._batcher.signs_of_life

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

    def stage(
        self, units: Iterable[Unit], max_bytes_per_s: float | None = None, copy: CopyExpert = lambda *_: None
    ) -> None:
        """Reads the units' weights while the versions served go on. Raises WeightShapeError.

        copy: where an expert is looked for before the checkpoint.
        """
        on_read = None if max_bytes_per_s is None else Pacer(max_bytes_per_s, lambda: self._batcher.num_waiting).pace
        self._store.stage(units, on_read, copy)
        self._self_check.note()
        self._show_weights()

    def expert(self, layer_id: int, expert_id: int) -> Expert | None:
        """The weights of one that is held and right, under whichever version. From any thread."""
        if any(wrong.layer_id == layer_id for wrong in self.wrong_units()):
            return None
        return self._store.expert(layer_id, expert_id)

    def activate(self, placement_version: int, units: Iterable[Unit]) -> None:
        """Serves `units` under `placement_version`, beside the versions served before; reads what is not staged."""
        self._store.activate(placement_version, units)
        self._self_check.note()
        self._show_weights()

    def release(self, placement_version: int) -> None:
        """Serves a version no longer, and drops what was only staged; forwards admitted under it are still answered."""
        self._store.release(placement_version)
        self._show_weights()

    def drop_staged(self) -> None:
        """Drops units that no placement served has."""
        self._store.drop_staged()
        self._show_weights()

    def wrong_units(self) -> list[WrongUnit]:
        """Units that do not give their known answers, and whose forwards are refused. From any thread."""
        return self._self_check.wrong_units()

    def known_answers(self) -> dict[tuple[int, int], int]:
        """What each expert held makes of the fixed row, by (layer_id, expert_id); the same on every shard."""
        return self._self_check.answers()

    def read_again(self, experts: Iterable[tuple[int, int]]) -> None:
        """Reads the units of experts, by (layer_id, expert_id), whose answers are not those of other shards."""
        self._self_check.read_again(experts)

    def repair(self) -> None:
        """Reads such units again."""
        self._self_check.repair()

    def forward(self, frame: bytes) -> Future[bytes]:
        """The answer to a ForwardRequest frame, which may be an error's.

        Cancelling the future drops the forward if it still waits. Raises InvalidRequest for bytes that are no
        ForwardRequest, to which no answer can be given.
        """
        header, payload = decode_frame(expert_pb2.ForwardHeader, frame)
        number = header.sequence_number
        answer: Future[bytes] = Future()

        def on_done(outcome: ForwardOutput | MobulaError) -> None:
            frame = answer_frame(number, outcome)  # may raise, and then is told an error
            if answer.set_running_or_notify_cancel():
                answer.set_result(frame)

        waiting = self.submit(header, Memory.of(payload), on_done)

        def give_up(answer: Future[bytes]) -> None:
            if answer.cancelled() and waiting is not None:
                waiting.is_given_up = True

        answer.add_done_callback(give_up)
        return answer

    def submit(
        self,
        header: expert_pb2.ForwardHeader,
        payload: Memory,
        on_done: Callable[[ForwardOutput | MobulaError], None],
        answer: Memory | None = None,
    ) -> WaitingForward | None:
        """Queues a forward; None when it was refused, and then `on_done` has been told why already.

        payload: read when it is computed; its indices are read once, now, so whoever shares its memory can spoil only
        his own values. answer: memory for exactly the partial sums; None for a tensor of their own.
        """
        try:
            layer = self._store.layer(header.placement_version, header.layer_id)
            if layer is None:
                raise InvalidRequest(
                    f"layer {header.layer_id} has no routed experts, only layers {list(self._model.moe_layer_ids)} do",
                    field="header.layer_id",
                )
            forward = read_forward(header, payload, self._model, layer)
            self._self_check.refuse_wrong(layer, forward)
            out = None if answer is None else answer_matrix(answer, forward, self._model)
            waiting = WaitingForward(
                weights=layer,
                forward=forward,
                on_done=on_done,
                out=out,
                num_bytes=payload.num_bytes if answer is None else 0,
                timeout_ns=header.timeout_ms * 1_000_000 or None,
            )
            self._batcher.submit(waiting)
        except MobulaError as error:
            on_done(error)
            return None
        return waiting

    def load(self) -> LoadSnapshot:
        """Counted load since the shard started."""
        self._metrics.wait_until_counted()
        return self._load.snapshot()

    def _compute(self, batch: list[WaitingForward]) -> Matrix:
        merged = merge([waiting.forward for waiting in batch])
        return self._ffn(merged, batch[0].weights.experts, batch[0].out if len(batch) == 1 else None)

    def _count(self, batch: list[WaitingForward], started_ns: int, compute_ns: int) -> None:
        forwards = [waiting.forward for waiting in batch]
        self._load.count(batch[0].weights.layer_id, forwards, compute_ns)
        metrics, row_bytes = self._metrics, self._model.hidden_size * self._model.dtype.itemsize
        metrics.compute_seconds.observe(compute_ns / 1e9)
        metrics.batched_calls.observe(len(batch))
        metrics.num_forwards += len(batch)
        for waiting, forward in zip(batch, forwards, strict=True):
            metrics.queue_seconds.observe((started_ns - waiting.arrived_ns) / 1e9)
            metrics.num_rows += forward.num_rows
            metrics.num_assignments += forward.num_assignments
            metrics.num_partial_sums += forward.num_partial_sums
            metrics.received_bytes += forward.num_rows * row_bytes + len(forward.assignment_bytes)
            metrics.sent_bytes += forward.num_partial_sums * row_bytes

    def _check_next(self) -> None:
        layer = self._self_check.check_next()
        if layer is not None:
            self._batcher.refuse(layer, StalePlacement("a unit of the layer was found wrong just now; ask again"))

    def _show_weights(self) -> None:
        self._metrics.weight_bytes = self._store.weight_bytes
        self._metrics.num_units = self._store.num_units
