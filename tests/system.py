"""The whole system in one process: real roles and real gRPC between them, no Ray. Tests call it like any client."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from cluster.config import MobulaConfig, parse_config
from cluster.controller.process import ProcessState
from cluster.roles.gateway_role import GatewayRole
from cluster.roles.preflight import check
from cluster.roles.role import Role
from cluster.roles.shard_role import ShardRole
from cluster.roles.worker_role import WorkerRole
from protos import generation_pb2 as pb
from protos import generation_pb2_grpc

HOST = "127.0.0.1"
TIMEOUT_S = 240.0


class System:
    """Shards, workers and a gateway over one checkpoint. Leaving the block stops them all."""

    def __init__(self, model: Path, *, num_workers: int = 1, num_shards: int = 1, **settings: Any) -> None:
        """settings: further keys of the configuration, such as attention_workers={"engine": {...}}."""
        data: dict[str, Any] = {"model": str(model), "gateway": {"port": 0, "metrics_port": 0}} | settings
        data["attention_workers"] = {"count": num_workers} | settings.get("attention_workers", {})
        data["expert_shards"] = {"count": num_shards} | settings.get("expert_shards", {})
        self.config: MobulaConfig = parse_config(data)
        self.plan = check(self.config)
        self.shards = [ShardRole(self.config, rank, HOST) for rank in range(num_shards)]
        self.workers = [WorkerRole(self.config, rank, HOST) for rank in range(num_workers)]
        self.gateway = GatewayRole(self.config, HOST)

    @property
    def roles(self) -> list[Role]:
        return [self.gateway, *self.workers, *self.shards]

    def __enter__(self) -> Self:
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda role: role.load(self.plan.expert_map), self.roles))
        for role in self.roles:
            assert role.health().state is ProcessState.READY, role.health().detail
        self.connect()
        self.channel = self._connection()
        self.stub = generation_pb2_grpc.InferenceStub(self.channel)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.channel.close()
        for role in self.roles:
            role.stop(0.0)

    def connect(self) -> None:
        """Tells every worker where the shards are and the gateway where the workers are, as the controller does."""
        shards = {rank: shard.health().address for rank, shard in enumerate(self.shards)}
        for worker in self.workers:
            worker.update_placement(self.plan.expert_map, shards)
        workers = {rank: worker.health().address for rank, worker in enumerate(self.workers)}
        named = {f"worker-{rank}": worker for rank, worker in enumerate(self.workers)}
        named |= {f"shard-{rank}": shard for rank, shard in enumerate(self.shards)}
        self.gateway.update_members(workers, {name: role.health().metrics_address for name, role in named.items()})

    def _connection(self) -> grpc.Channel:
        clients = self.config.tls.clients
        if clients is None:
            return grpc.insecure_channel(self.address)
        authority = (Path(clients) / "ca.crt").read_bytes()
        return grpc.secure_channel(self.address, grpc.ssl_channel_credentials(authority))

    @property
    def address(self) -> str:
        return self.gateway.health().address

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """The greedy continuation of a prompt, ignoring end tokens."""
        params = pb.SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling_params=params)
        answers = self.stub.Generate(request, timeout=TIMEOUT_S)
        return [token_id for answer in answers for token_id in answer.token_ids]

    def greedy_at_once(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        """The same for many prompts, all in flight together."""
        start = threading.Barrier(len(prompts))

        def run(prompt: Sequence[int]) -> list[int]:
            start.wait()
            return self.greedy(prompt, num_tokens)

        with ThreadPoolExecutor(max_workers=len(prompts)) as pool:
            return list(pool.map(run, prompts))

    def becomes_idle(self) -> bool:
        """Whether it is idle within a few seconds: an engine says so after it has given the last token out."""
        give_up_at_s = time.monotonic() + 10.0
        while not self.is_idle() and time.monotonic() < give_up_at_s:
            time.sleep(0.01)
        return self.is_idle()

    def is_idle(self) -> bool:
        """Whether no request is in flight, every cache block is free and no forward waits."""
        stats = [worker.engine_stats() for worker in self.workers]
        return all(
            stat.num_running + stat.num_waiting == 0 and stat.num_free_blocks == stat.num_blocks for stat in stats
        )
