"""Where the time of one decode step and one prefill goes, by part, with shards as separate processes.

    python -m tests.bench.layer_time [MODEL FOLDER] [--dtype D] [--shards N] [--batch N] [--context N] [--prefill N]

Prints a table: milliseconds a step and share of the step. The parts of a mixture layer beyond the worker's own work
come from the shards' clocks (queue, expert FFN); `wire` is what is left of the wait: encoding on the shard, gRPC,
wake-ups. The machine is shared: compare shares, not times.
"""

import argparse
import multiprocessing
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from prometheus_client import CollectorRegistry
from rich.console import Console
from rich.progress import track
from rich.table import Table

from attention import decoder as decoder_module
from attention.decoder import Decoder, DecoderWeights
from attention.latent_cache import LatentCache
from attention.mla import Mla
from cluster import bundled_model
from cluster.config import MobulaConfig, parse_config
from cluster.preflight import check
from cluster.shard_role import ShardRole
from protos.loop_thread import LoopThread
from router import dispatch_handle
from router.grpc_transport import GrpcTransport
from router.metrics import RouterMetrics
from router.router import Router, RouterConfig
from tests.attention.steps import StepRunner, cache_config

NUM_WARMUP, NUM_STEPS = 3, 30
MAX_SECONDS = 30.0  # of a measurement; a large model takes fewer steps
PARTS = (
    "attention",
    "gate",
    "plan, pack and send",
    "dense and shared MLP",
    "wire",
    "queue",
    "expert FFN",
    "combine",
    "rest",
)


class Stopwatch:
    """Seconds by part, one sum a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._answers: list[tuple[float, float]] = []  # (queue, compute) of the layer's answers

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[part] += time.perf_counter() - start

        return run

    def decoding(self, decode: Callable[..., Any]) -> Callable[..., Any]:
        """Notes the shard's own timing in every answer."""

        def run(*args: Any) -> Any:
            header, payload = decode(*args)
            self._answers.append((header.timing.queue_ns / 1e9, header.timing.compute_ns / 1e9))
            return header, payload

        return run

    def waiting(self, combine: Callable[..., Any]) -> Callable[..., Any]:
        """Splits the wait of one layer by its slowest answer."""

        def run(*args: Any) -> Any:
            self._answers.clear()
            combined_before = self.seconds["combine"]
            start = time.perf_counter()
            result = combine(*args)
            waited = time.perf_counter() - start - (self.seconds["combine"] - combined_before)
            queue, compute = max(self._answers, key=sum, default=(0.0, 0.0))
            # Part of the shard's time passed while the worker ran the shared experts: only the rest was waited for.
            compute = min(compute, waited)
            queue = min(queue, waited - compute)
            self.seconds["expert FFN"] += compute
            self.seconds["queue"] += queue
            self.seconds["wire"] += waited - compute - queue
            return result

        return run

    def install(self, stack: ExitStack) -> None:
        """Times the parts until the stack is left."""
        patches = (
            (Mla, "forward", self.timed("attention", Mla.forward)),
            (decoder_module, "router_logits", self.timed("gate", decoder_module.router_logits)),
            (decoder_module, "select_experts", self.timed("gate", decoder_module.select_experts)),
            (Router, "dispatch", self.timed("plan, pack and send", Router.dispatch)),
            (Router, "combine", self.waiting(Router.combine)),
            (dispatch_handle, "decode_frame", self.decoding(dispatch_handle.decode_frame)),
            (dispatch_handle, "sum_partials", self.timed("combine", dispatch_handle.sum_partials)),
        )
        for owner, name, replacement in patches:
            stack.enter_context(mock.patch.object(owner, name, replacement))


def run_shard(config: MobulaConfig, ep_rank: int, pipe: Connection) -> None:
    """A shard's process: serves until the pipe says stop."""
    shard = ShardRole(config, ep_rank, "127.0.0.1")
    shard.load(check(config).expert_map)
    pipe.send(shard.health())
    pipe.recv()
    shard.stop(0.0)


def measure(runner: StepRunner, batch: int, num_tokens: int, context: int, name: str) -> dict[str, float]:
    """Median seconds by part of a step in which `batch` sequences bring `num_tokens` each."""
    stopwatch = Stopwatch()
    steps: list[dict[str, float]] = []
    shared = decoder_module.SwiGlu.forward
    with ExitStack() as stack:
        stopwatch.install(stack)
        stack.enter_context(
            mock.patch.object(decoder_module.SwiGlu, "forward", stopwatch.timed("dense and shared MLP", shared))
        )
        total = NUM_WARMUP + NUM_STEPS
        prompts = [[3 + (i * 7 + seq) % 300 for i in range(context + num_tokens * total)] for seq in range(batch)]
        rows = [runner.sequence(prompt) for prompt in prompts]
        if context:
            runner.step([(row, context) for row in rows])
        began = time.perf_counter()
        for number in track(range(total), description=name, transient=True):
            if number > NUM_WARMUP and time.perf_counter() - began > MAX_SECONDS:
                break
            if num_tokens > 1:  # a prefill starts from an empty cache each time
                for row in rows:
                    row.num_computed_tokens = 0
            stopwatch.seconds.clear()
            start = time.perf_counter()
            runner.step([(row, num_tokens) for row in rows])
            stopwatch.seconds["step"] = time.perf_counter() - start
            if number >= NUM_WARMUP:
                steps.append(dict(stopwatch.seconds))
    medians = {part: statistics.median(step.get(part, 0.0) for step in steps) for part in (*PARTS, "step")}
    medians["rest"] = medians["step"] - sum(medians[part] for part in PARTS if part != "rest")
    return medians


def report(results: dict[str, dict[str, float]], num_layers: int, console: Console) -> None:
    table = Table(title=f"time of one step by part ({num_layers} layers)", title_justify="left")
    table.add_column("part")
    for name in results:
        table.add_column(f"{name}\nms", justify="right")
        table.add_column("share", justify="right")
    for part in (*PARTS, "step"):
        if part == "step":
            table.add_section()
        cells = []
        for medians in results.values():
            cells += [f"{1e3 * medians[part]:.3f}", f"{medians[part] / medians['step']:.1%}"]
        table.add_row(part, *cells)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=bundled_model.path())
    parser.add_argument("--dtype", default="float32", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--prefill", type=int, default=512)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = parse_config(
        {"model": str(arguments.model), "dtype": arguments.dtype, "expert_shards": {"count": arguments.shards}}
    )
    plan = check(config)
    spawn = multiprocessing.get_context("spawn")
    pipes = []
    for rank in range(arguments.shards):
        ours, theirs = spawn.Pipe()
        spawn.Process(target=run_shard, args=(config, rank, theirs), daemon=True).start()
        pipes.append(ours)
    addresses = {rank: pipe.recv().address for rank, pipe in enumerate(pipes)}
    loop, decoder_config = LoopThread("loop"), plan.model.config.decoder
    router = Router(
        config=RouterConfig(),
        gate=decoder_config.gate,
        expert_map=plan.expert_map,
        addresses=addresses,
        connect=lambda address: GrpcTransport(address, loop.loop),
        metrics=RouterMetrics(CollectorRegistry(), dp_rank=0),
    )
    assert router.wait_until_connected(30.0) == []
    num_blocks = 4096
    runner = StepRunner(arguments.model, dtype=plan.model.dtype, num_blocks=num_blocks)
    weights = DecoderWeights.read(plan.model.checkpoint, decoder_config, plan.model.dtype)
    cache = LatentCache(cache_config(decoder_config, num_blocks, plan.model.dtype))
    runner.decoder = Decoder(decoder_config, weights, router, cache)
    console = Console()
    with torch.inference_mode():
        results = {
            f"decode x {arguments.batch}": measure(runner, arguments.batch, 1, arguments.context, "decode"),
            f"prefill {arguments.prefill}": measure(runner, 1, arguments.prefill, 0, "prefill"),
        }
    report(results, decoder_config.num_hidden_layers, console)
    router.close()
    for pipe in pipes:
        pipe.send("stop")


if __name__ == "__main__":
    main()
