"""The same code in one process: a worker and one shard with every expert, without Ray, gateway and wire.

    python -m tests.bench.one_process --config FILE

Says `serving MODEL at HOST:PORT` and serves the inference API until it is told to end. What it is faster by than
`mobula serve` is what it costs that experts are separate processes.
"""

import argparse
import signal
from pathlib import Path
from unittest import mock

from cluster.config import read_config
from cluster.controller.process import ProcessState
from cluster.roles import worker_role
from cluster.roles.preflight import check
from cluster.roles.role import Role
from cluster.roles.shard_role import ShardRole
from cluster.roles.worker_role import WorkerRole
from router.local_transport import LocalTransport

HOST = "127.0.0.1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    config = read_config(parser.parse_args().config)
    expert_map = check(config).expert_map
    shard_role = ShardRole(config, 0, HOST)
    shard_role.load(expert_map)
    _check(shard_role)
    shard = shard_role._shard
    assert shard

    def connect_to(*_: object) -> object:
        return lambda address: LocalTransport(shard.forward, address)

    with mock.patch.object(worker_role, "connect_to", connect_to):
        worker = WorkerRole(config, 0, HOST)
        worker.load(expert_map)
    _check(worker)
    worker.update_placement(expert_map, {0: shard_role.health().address})
    print(f"serving {config.model} at {worker.health().address}", flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    worker.stop(0.0)
    shard_role.stop(0.0)


def _check(role: Role) -> None:
    if role.health().state is not ProcessState.READY:
        raise SystemExit(f"could not load: {role.health().detail}")


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})  # all threads: main takes them
    main()
