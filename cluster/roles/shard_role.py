"""An expert shard's process: reads its placement units and answers forwards."""

import logging
import threading
from collections.abc import Iterable
from dataclasses import replace

from cluster.config import ActorConfig, MobulaConfig
from cluster.controller.process import ProcessHealth, Quarantine
from cluster.controller.shard_usage import ShardWork
from cluster.roles.compute_threads import compute_with, share_of_cores
from cluster.roles.preflight import open_model
from cluster.roles.role import Role, failure_domain
from cluster.roles.thread_watch import ThreadWatch
from experts.load_snapshot import LoadSnapshot
from experts.metrics import ShardMetrics
from experts.peer_weights import PeerWeights
from experts.servicer import ExpertServer
from experts.shard import ExpertShard, ShardConfig
from experts.weight_store import Unit
from protos.credentials import PeerRole
from protos.errors import Unavailable
from router.expert_map import ExpertMap, PlacementUnit

logger = logging.getLogger(__name__)


class ShardRole(Role):
    """An expert shard."""

    def __init__(self, config: MobulaConfig, ep_rank: int, host: str | None) -> None:
        super().__init__(config, PeerRole.SHARD, ep_rank, host)
        self._ep_rank = ep_rank
        self._domain = "" if host else failure_domain(config.expert_shards.failure_domain_label)
        self._shard: ExpertShard | None = None
        self._server: ExpertServer | None = None
        self._metrics = ShardMetrics(self._registry, ep_rank)
        self._placement_lock = threading.Lock()  # the weights change in one call at a time

    @property
    def placement_version(self) -> int | None:
        return max(self._shard.placement_versions, default=None) if self._shard else None

    def _load(self, expert_map: ExpertMap) -> tuple[str, int]:
        shards = self._config.expert_shards
        compute_with(shards.num_threads or share_of_cores(shards.count))
        model = open_model(self._config)
        units = [Unit(*unit) for unit in expert_map.units_of(self._ep_rank)]
        for unit in units:
            for expert_id in unit.expert_ids:
                model.checkpoint.check_role(model.config.decoder.expert_weight_shapes(unit.layer_id, expert_id))
        shard_config = ShardConfig(
            ep_rank=self._ep_rank,
            max_waiting_forwards=shards.max_waiting_forwards,
            max_waiting_bytes=shards.max_waiting_mib * 2**20,
            self_check_interval_s=shards.self_check_interval_s,
        )
        shard = ExpertShard(
            shard_config, model.expert_model, model.checkpoint, self._metrics, on_wrong=self._begin_repair
        )
        shard.activate(expert_map.placement_version, units)
        shard.start()
        self._shard = shard
        self._watch = ThreadWatch("experts", shard)
        self._server = self._loop.run(ExpertServer.start(shard, self._host, shards.port, self._credentials))
        self._loop.run(self._server.set_serving(True))
        self._serve_health(self._server.health)
        return f"{self._host}:{self._server.port}", shard.weight_bytes

    def stage(self, units: Iterable[PlacementUnit], max_bytes_per_s: float, sources: Iterable[str]) -> None:
        """Reads units while the shard serves. Raises WeightShapeError, InvalidCheckpoint.

        sources: for each unit the host:port of a shard that has it, or "" for the checkpoint.
        """
        shard = self._loaded_shard()
        wanted = [Unit(*unit) for unit in units]
        held_by = {unit: address for unit, address in zip(wanted, sources, strict=True) if address}
        with (
            self._placement_lock,
            PeerWeights(self._loop, self._credentials, shard.model, held_by, max_bytes_per_s) as peers,
        ):
            shard.stage(wanted, max_bytes_per_s, peers.copy)

    def activate(self, placement_version: int, units: Iterable[PlacementUnit]) -> None:
        """Serves a placement beside those served before."""
        with self._placement_lock:
            self._loaded_shard().activate(placement_version, [Unit(*unit) for unit in units])

    def release(self, placement_version: int) -> None:
        """Serves a placement no longer; what no other needs is dropped, units that were only staged too."""
        with self._placement_lock:
            self._loaded_shard().release(placement_version)

    def serve_only(self, expert_map: ExpertMap) -> None:
        """Serves one placement and drops whatever no longer belongs to it; reads what it lacks."""
        version = expert_map.placement_version
        with self._placement_lock:
            shard = self._loaded_shard()
            if version not in shard.placement_versions:
                shard.activate(version, [Unit(*unit) for unit in expert_map.units_of(self._ep_rank)])
            for other in set(shard.placement_versions) - {version}:
                shard.release(other)
            shard.drop_staged()

    def known_answers(self) -> dict[tuple[int, int], int]:
        """What each expert makes of a fixed row, to be compared with other shards'."""
        return self._loaded_shard().known_answers()

    def read_again(self, experts: Iterable[tuple[int, int]]) -> None:
        """Reads the units of these experts again, by (layer_id, expert_id). Raises InvalidCheckpoint."""
        with self._placement_lock:
            self._loaded_shard().read_again(experts)

    def _begin_repair(self) -> None:
        """In the compute thread, which must not wait."""
        threading.Thread(target=self._repair, name="repair", daemon=True).start()

    def _repair(self) -> None:
        try:
            with self._placement_lock:
                self._loaded_shard().repair()
        except Exception:  # the thread's top: the units stay quarantined, and the health says so
            logger.exception("quarantined units could not be read again")

    def load_counts(self) -> LoadSnapshot:
        """What was computed since the process started."""
        return self._loaded_shard().load()

    def work(self) -> ShardWork:
        """What it has done since it started."""
        counted = self._metrics
        return ShardWork(
            compute_s=counted.compute_seconds.total,
            queue_s=counted.queue_seconds.total,
            num_forwards=counted.num_forwards,
            num_assignments=counted.num_assignments,
        )

    def health(self) -> ProcessHealth:
        """As every process; weights come and go."""
        shard = self._shard
        health = replace(super().health(), domain=self._domain)
        if shard is None:
            return health
        wrong = tuple(Quarantine(self._ep_rank, *unit) for unit in shard.wrong_units())
        return replace(health, weight_bytes=shard.weight_bytes, num_units=shard.num_units, quarantines=wrong)

    def _loaded_shard(self) -> ExpertShard:
        if self._shard is None:
            raise Unavailable(f"shard {self._ep_rank} has not loaded yet")
        return self._shard

    def _stop(self, drain_timeout_s: float) -> None:
        if self._shard and self._server:
            self._shard.stop()
            self._loop.run(self._server.stop(grace_s=min(0.2, drain_timeout_s)))

    def _ports(self) -> ActorConfig:
        return self._config.expert_shards
