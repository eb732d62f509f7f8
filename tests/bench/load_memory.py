"""How much memory a worker and each shard take while they read their weights, against what they keep.

    python -m tests.bench.load_memory [MODEL FOLDER] [--shards 2]

Every role loads in a process of its own, one after the other. `growth` is the peak resident set minus the resident set
before loading: weights, what reading needs besides, and the role's servers. The latent cache takes no memory until it
is written.
"""

import argparse
import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from cluster import bundled_model
from cluster.config import MobulaConfig, parse_config
from cluster.preflight import check
from cluster.process import ProcessHealth, ProcessState
from cluster.shard_role import ShardRole
from cluster.views import format_bytes
from cluster.worker_role import WorkerRole


def load(config: MobulaConfig, role: str, rank: int, pipe: Connection) -> None:
    """A role's process."""
    process = ShardRole(config, rank, "127.0.0.1") if role == "shard" else WorkerRole(config, rank, "127.0.0.1")
    expert_map = check(config).expert_map
    start = time.perf_counter()
    process.load(expert_map)
    pipe.send((process.health(), time.perf_counter() - start))


def measure(config: MobulaConfig, role: str, rank: int) -> tuple[ProcessHealth, float]:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=load, args=(config, role, rank, theirs), daemon=True)
    process.start()
    answer: tuple[ProcessHealth, float] = ours.recv()
    process.kill()
    process.join()
    assert answer[0].state is ProcessState.READY, answer[0].detail
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=bundled_model.path())
    parser.add_argument("--shards", type=int, default=2)
    arguments = parser.parse_args()
    config = parse_config({"model": str(arguments.model), "expert_shards": {"count": arguments.shards}})
    roles = [("worker", 0), *(("shard", rank) for rank in range(arguments.shards))]
    table = Table(title="memory while loading", title_justify="left")
    for heading in ("process", "weights kept", "growth at the peak", "growth / kept", "peak resident set", "seconds"):
        table.add_column(heading, justify="right")
    for role, rank in track(roles, description="loading", transient=True):
        health, seconds = measure(config, role, rank)
        table.add_row(
            f"{role}-{rank}",
            format_bytes(health.weight_bytes),
            format_bytes(health.load_rss_bytes),
            f"{health.load_rss_bytes / health.weight_bytes:.3f}",
            format_bytes(health.peak_rss_bytes),
            f"{seconds:.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
