"""Where the time of one step goes, by part: a worker that is called over gRPC, its shards processes of their own.

The parts of a mixture layer beyond the worker's own work come from the shards' clocks; `wire` is what is left of the
wait: encoding on the shard, transport, wake-ups. Shares are steadier than times on a machine that is shared. Where
worker and shards share cores, a part that waits for its turn counts what others compute meanwhile; the row "on a
processor" does not.
"""

import multiprocessing
import os
import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

from cluster.config import MobulaConfig, parse_config
from cluster.controller.process import ProcessState
from cluster.roles.compute_threads import share_of
from cluster.roles.preflight import check
from cluster.roles.role import Role
from cluster.roles.shard_role import ShardRole
from cluster.roles.worker_role import WorkerRole
from tests.bench.load_client import LoadClient
from tests.bench.measured_model import MeasuredModel, measured_models
from tests.bench.row import Options, Row, Unmeasurable
from tests.bench.stopwatch import KERNELS, Stopwatch

NAME = "layers"
HOST = "127.0.0.1"
NUM_SHARDS = 2
BATCH, CONTEXT, NUM_STEPS = 8, 128, 48
NUM_PROMPT_TOKENS, NUM_PROMPTS = 512, 3
TIMEOUT_S = 120.0
MIN_SHARE = 0.005  # of a step; parts with less have no row
TRANSPORTS: dict[str, dict[str, Any]] = {"shared memory": {}, "gRPC": {"shared_memory_mib": 0}}  # keys of the router


def rows(options: Options) -> Iterator[Row]:
    """By model, transport, step and part."""
    for model in measured_models(options, options.formats[:1]):
        if not isinstance(model, MeasuredModel):
            name, kind, why = model
            yield Row.missing(NAME, {"model": name, "format": kind}, why)
            continue
        for transport, settings in TRANSPORTS.items():
            params = {"model": model.name, "transport": transport}
            try:
                options.check_time(30.0)
                options.show(f"{model.name}: a step's time, {transport}")
                with _system(model, options, settings) as (client, worker):
                    yield from _step_rows(client, worker, params)
            except Unmeasurable as error:
                yield Row.missing(NAME, params, str(error))


def _step_rows(client: LoadClient, worker: Connection, params: dict[str, Any]) -> Iterator[Row]:
    client.decode(BATCH, 16, 4, 0)  # the first steps are slower
    worker.send((BATCH, BATCH))
    client.decode(BATCH, CONTEXT, NUM_STEPS, 1, counts_experts=False)
    yield from _part_rows(*_steps(worker), params | {"step": f"decode x {BATCH}"})
    worker.send((1, NUM_PROMPT_TOKENS))
    for seed in range(NUM_PROMPTS):
        client.prefill(NUM_PROMPT_TOKENS, seed)
    yield from _part_rows(*_steps(worker), params | {"step": f"prefill {NUM_PROMPT_TOKENS}"})


def _part_rows(steps: list[dict[str, float]], busy_outside: list[float], params: dict[str, Any]) -> Iterator[Row]:
    if not steps:
        raise Unmeasurable(f"no step of {params['step']} was seen; it was cut into chunks")
    totals = [sum(step.values()) for step in steps]
    yield Row.of(NAME, params | {"part": "all"}, [1e3 * total for total in totals], "ms")
    parts = sorted({part for step in steps for part in step}, key=lambda part: -_median(steps, part))
    for part in parts:
        share = statistics.median(step.get(part, 0.0) / total for step, total in zip(steps, totals, strict=True))
        if share < MIN_SHARE:
            continue
        samples = [1e3 * step.get(part, 0.0) for step in steps]
        yield Row.of(NAME, params | {"part": part, "share": f"{share:.1%}"}, samples, "ms")
    outside = [
        100 * (1 - sum(step.get(part, 0.0) for part in KERNELS) / total)
        for step, total in zip(steps, totals, strict=True)
    ]
    yield Row.of(NAME, params | {"part": "outside the kernels"}, outside, "%")
    busy = [100 * seconds / total for seconds, total in zip(busy_outside, totals, strict=True)]
    yield Row.of(NAME, params | {"part": "outside the kernels, on a processor"}, busy, "%")


def _median(steps: list[dict[str, float]], part: str) -> float:
    return statistics.median(step.get(part, 0.0) for step in steps)


def _steps(worker: Connection) -> tuple[list[dict[str, float]], list[float]]:
    """Of each step its parts' seconds, and those that the thread was on a processor outside the kernels."""
    worker.send(None)
    if not worker.poll(TIMEOUT_S):
        raise Unmeasurable("the worker does not answer")
    steps: list[dict[str, float]]
    busy_outside: list[float]
    steps, busy_outside = worker.recv()
    return steps, busy_outside


@contextmanager
def _system(model: MeasuredModel, options: Options, router: dict[str, Any]) -> Iterator[tuple[LoadClient, Connection]]:
    """A timed worker and its shards, each a process; a client of the worker."""
    worker_threads, shard_threads = share_of(options.num_threads, 1), share_of(options.num_threads, NUM_SHARDS)
    workers = {"count": 1, "num_threads": worker_threads, "router": router}
    shards = {"count": NUM_SHARDS, "num_threads": shard_threads}
    config = parse_config({"model": str(model.folder), "attention_workers": workers, "expert_shards": shards})
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {"OMP_WAIT_POLICY": "passive", "GRPC_VERBOSITY": "ERROR"}))
        pipes = [_start(stack, _run_shard, config, rank) for rank in range(NUM_SHARDS)]
        addresses = {rank: _receive(pipe) for rank, pipe in enumerate(pipes)}
        worker = _start(stack, _run_worker, config, addresses)
        client = LoadClient(_receive(worker))
        stack.callback(client.close)
        yield client, worker


def _start(stack: ExitStack, target: Any, *args: Any) -> Connection:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=target, args=(*args, theirs), daemon=True)
    process.start()
    theirs.close()
    stack.callback(process.join)
    stack.callback(process.kill)
    return ours


def _receive(pipe: Connection) -> str:
    try:
        if not pipe.poll(TIMEOUT_S):
            raise Unmeasurable(f"a process was not loaded after {TIMEOUT_S:.0f} s")
        return str(pipe.recv())
    except EOFError as error:
        raise Unmeasurable("a process ended while it loaded, see above") from error


def _run_shard(config: MobulaConfig, rank: int, pipe: Connection) -> None:
    """A shard's process: serves until it is killed."""
    shard = ShardRole(config, rank, HOST)
    shard.load(check(config).expert_map)
    pipe.send(_address(shard))
    pipe.poll(None)


def _run_worker(config: MobulaConfig, addresses: dict[int, str], pipe: Connection) -> None:
    """A timed worker's process: takes the shape of the steps to count, gives the steps for None."""
    stopwatch = Stopwatch()
    with ExitStack() as stack:
        stopwatch.install(stack)
        worker, expert_map = WorkerRole(config, 0, HOST), check(config).expert_map
        worker.load(expert_map)
        address = _address(worker)
        worker.update_placement(expert_map, addresses)
        pipe.send(address)
        while True:
            shape = pipe.recv()
            if shape is None:
                pipe.send((stopwatch.steps, stopwatch.busy_outside))
            else:
                stopwatch.begin(*shape)


def _address(role: Role) -> str:
    if role.health().state is not ProcessState.READY:
        raise SystemExit(f"could not load: {role.health().detail}")
    return role.health().address
