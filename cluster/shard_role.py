"""An expert shard's process: reads its placement units and answers forwards."""

from cluster.compute_threads import compute_with, share_of_cores
from cluster.config import MobulaConfig
from cluster.preflight import open_model
from cluster.role import Role
from experts.metrics import ShardMetrics
from experts.servicer import ExpertServer
from experts.shard import ExpertShard, ShardConfig
from experts.weight_store import Unit
from router.expert_map import ExpertMap


class ShardRole(Role):
    """An expert shard."""

    def __init__(self, config: MobulaConfig, ep_rank: int, host: str | None) -> None:
        super().__init__(config, host)
        self._ep_rank = ep_rank
        self._shard: ExpertShard | None = None
        self._server: ExpertServer | None = None

    def _load(self, expert_map: ExpertMap) -> tuple[str, int]:
        shards = self._config.expert_shards
        compute_with(shards.num_threads or share_of_cores(shards.count))
        model = open_model(self._config)
        units = [Unit(*unit) for unit in expert_map.units_of(self._ep_rank)]
        for unit in units:
            for expert_id in unit.expert_ids:
                model.checkpoint.check_role(model.config.decoder.expert_weight_shapes(unit.layer_id, expert_id))
        shard_config = ShardConfig(
            ep_rank=self._ep_rank, max_waiting_forwards=self._config.expert_shards.max_waiting_forwards
        )
        shard = ExpertShard(
            shard_config, model.expert_model, model.checkpoint, ShardMetrics(self._registry, self._ep_rank)
        )
        shard.activate(expert_map.placement_version, units)
        shard.start()
        self._shard = shard
        self._server = self._loop.run(ExpertServer.start(shard, self._host, 0))
        self._loop.run(self._server.set_serving(True))
        return f"{self._host}:{self._server.port}", shard.weight_bytes

    def stop(self, drain_timeout_s: float) -> None:
        if self._shard and self._server:
            self._shard.stop()
            self._loop.run(self._server.stop(grace_s=0.2))
