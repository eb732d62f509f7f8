"""What a layer's dispatch and combine cost, over gRPC and without a wire.

    python -m tests.bench.round_trip [ep_size] [hidden_size]

Hot: one worker, back-to-back calls, shards and worker in one process (the shards' threads compete with the worker for
the interpreter, so separate processes do better). The experts are tiny: this is the data plane and the plan, not the
experts. GRPC_EXPERIMENTS=-event_engine_client,-event_engine_listener has to be set before Python starts.
"""

import statistics
import sys
import time

import torch

from experts.servicer import ExpertServer
from experts.weight_store import ExpertModel
from protos.loop_thread import LoopThread
from router.grpc_transport import GrpcTransport
from router.local_transport import LocalTransport
from router.router import Router
from tests.fake_experts import MOE_LAYER_IDS, grouped_gate, placed, random_rows, router_to, running_shards

NUM_ROUND_TRIPS = 200


def measure(name: str, router: Router, hidden_size: int) -> None:
    assert router.wait_until_connected(30) == []
    for num_tokens in (1, 8, 64):
        rows = random_rows(grouped_gate(), num_tokens, hidden_size)
        dispatch_s, total_s = [], []
        for number in range(NUM_ROUND_TRIPS):
            started_s = time.perf_counter()
            layer_id = MOE_LAYER_IDS[number % len(MOE_LAYER_IDS)]
            handle = router.dispatch(layer_id, rows.hidden_states, rows.topk_weights, rows.topk_ids)
            dispatch_s.append(time.perf_counter() - started_s)
            router.combine(handle)
            total_s.append(time.perf_counter() - started_s)
        total_s.sort()
        print(
            f"{name:6} {num_tokens:4} tokens: dispatch {1e6 * statistics.median(dispatch_s):6.0f} us, "
            f"round trip p50 {1e6 * statistics.median(total_s):6.0f} us, "
            f"p95 {1e6 * total_s[-NUM_ROUND_TRIPS // 20]:6.0f} us"
        )


def main() -> None:
    torch.set_num_threads(1)
    ep_size = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    hidden_size = int(sys.argv[2]) if len(sys.argv) > 2 else 2048
    gate = grouped_gate()
    expert_map = placed(gate, ep_size)
    model = ExpertModel(
        moe_layer_ids=MOE_LAYER_IDS, n_routed_experts=16, hidden_size=hidden_size, moe_intermediate_size=8,
        dtype=torch.float32,
    )  # fmt: skip
    worker_loop, shard_loop = LoopThread("worker-loop"), LoopThread("shard-loop")
    with running_shards(expert_map, model) as shards:
        local = router_to(gate, expert_map, lambda rank: LocalTransport(shards[int(rank)].forward, rank))
        measure("local", local, hidden_size)
        servers = [shard_loop.run(ExpertServer.start(shard, "127.0.0.1", 0)) for shard in shards]
        router = router_to(
            gate, expert_map, lambda address: GrpcTransport(address, worker_loop.loop),
            addresses={rank: f"127.0.0.1:{server.port}" for rank, server in enumerate(servers)},
        )  # fmt: skip
        measure("grpc", router, hidden_size)
        router.close()
        for server in servers:
            shard_loop.run(server.stop(0.0))


if __name__ == "__main__":
    main()
