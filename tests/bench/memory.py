"""Memory: proportional set size of all processes together, Ray's included, after requests were served.

Shared pages count once. Then, by role, how much more than its weights a process took at the worst moment of loading.
"""

import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection

from cluster.config import MobulaConfig, parse_config
from cluster.controller.process import ProcessHealth, ProcessState
from cluster.roles.preflight import check
from cluster.roles.shard_role import ShardRole
from cluster.roles.worker_role import WorkerRole
from tests.bench.load_client import LoadClient
from tests.bench.measured_model import MeasuredModel, measured_models
from tests.bench.peers.peer import RunningPeer
from tests.bench.row import PLAIN, Options, Row, Unmeasurable
from tests.bench.served_system import ServedSystem

NAME = "memory"
MB = 1e6
NUM_SHARDS = 2
PROMPT, BATCH, CONTEXT, STEPS = 2048, 8, 128, 8  # what is served before memory is counted
LOAD_TIMEOUT_S = 120.0


def rows(options: Options) -> Iterator[Row]:
    """By model and format."""
    for model in measured_models(options, options.formats[:1]):
        if not isinstance(model, MeasuredModel):
            name, kind, why = model
            yield Row.missing(NAME, {"model": name, "format": kind}, why)
            continue
        try:
            options.check_time(30.0)
            yield from _serving(model, options)
            if model.kind == PLAIN:
                yield from _loading(model, options)
        except Unmeasurable as error:
            yield Row.missing(NAME, model.params, str(error))


def _serving(model: MeasuredModel, options: Options) -> Iterator[Row]:
    with model.served(options, num_shards=NUM_SHARDS) as (system, client):
        sizes = _used(system, client)
    total, turns = sum(sizes.values()), {}
    for peer in model.peers(options):
        options.show(f"{model.name} {model.kind}: memory of {peer.name}")
        try:
            options.check_time(30.0)
            with RunningPeer(peer, model.folder, model.kind, options) as running:
                running.prefill(PROMPT, 1)
                running.decode(BATCH, CONTEXT, STEPS, 1)
                turns[peer.name] = [(total / MB, running.memory_bytes() / MB)]
        except Unmeasurable as error:
            yield Row.missing(NAME, model.params | {"peer": peer.name}, str(error))
    params = model.params | {"processes": "all", "shards": NUM_SHARDS}
    yield Row.of(NAME, params, [total / MB], "MB", limits=[model.checkpoint_bytes / MB], turns=turns)
    beyond = (total - model.checkpoint_bytes) / MB
    yield Row.of(NAME, model.params | {"processes": "all, beyond the checkpoint"}, [beyond], "MB")
    for kind, size in sorted(sizes.items()):
        yield Row.of(NAME, model.params | {"processes": kind}, [size / MB], "MB")


def _used(system: ServedSystem, client: LoadClient) -> dict[str, int]:
    client.prefill(min(PROMPT, client.max_model_len // 2), 1)
    client.decode(BATCH, CONTEXT, STEPS, 1, counts_experts=False)
    return system.memory_bytes()


def _loading(model: MeasuredModel, options: Options) -> Iterator[Row]:
    config = parse_config({"model": str(model.folder), "expert_shards": {"count": NUM_SHARDS}})
    for role, rank in (("worker", 0), ("shard", 0)):
        options.show(f"{model.name}: loading as {role}-{rank}")
        params = model.params | {"process": f"{role}-{rank}"}
        try:
            health = _loaded(config, role, rank)
        except Unmeasurable as error:
            yield Row.missing("memory, loading", params, str(error))
            continue
        growth, kept = health.load_rss_bytes / MB, health.weight_bytes / MB
        yield Row.of("memory, loading", params, [growth], "MB", limits=[kept])


def _loaded(config: MobulaConfig, role: str, rank: int) -> ProcessHealth:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_load, args=(config, role, rank, theirs), daemon=True)
    process.start()
    try:
        if not ours.poll(LOAD_TIMEOUT_S):
            raise Unmeasurable(f"{role} was not loaded after {LOAD_TIMEOUT_S:.0f} s")
        health: ProcessHealth = ours.recv()
    except EOFError as error:
        raise Unmeasurable(f"{role} ended while it loaded") from error
    finally:
        process.kill()
        process.join()
    if health.state is not ProcessState.READY:
        raise Unmeasurable(f"{role}: {health.detail}")
    return health


def _load(config: MobulaConfig, role: str, rank: int, pipe: Connection) -> None:
    """A role's process."""
    process = ShardRole(config, rank, "127.0.0.1") if role == "shard" else WorkerRole(config, rank, "127.0.0.1")
    process.load(check(config).expert_map)
    pipe.send(process.health())
    pipe.recv()
