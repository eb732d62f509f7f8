"""`mobula demo`: starts everything on this machine, streams several prompts at once over gRPC, shows where every token
went, and stops everything.
"""

import logging
import threading
import time

import grpc
import psutil
from rich.console import Console
from rich.live import Live
from rich.markup import escape

from cluster.client import Generation, InferenceClient
from cluster.commands.plan_view import plan_view
from cluster.commands.progress import StartProgress
from cluster.commands.serve import START_ERRORS, treat_sigterm_as_ctrl_c
from cluster.commands.terminal import INTERRUPTED
from cluster.commands.views import experts_view, kinds_view, streams_view, summary_view
from cluster.config import MobulaConfig
from cluster.roles.launch import Deployment
from protos import generation_pb2

PROMPTS_BY_KIND = {
    "Python": (
        "class Handler:\n    def __init__(self, name):\n        ",
        "import unittest\n\nclass TestParser(unittest.TestCase):\n    ",
    ),
    "English": ("The following example shows how to", "This module provides"),
    "C": ("#ifndef Py_", "typedef struct {\n    "),
}
PROMPTS = tuple(prompt for prompts in PROMPTS_BY_KIND.values() for prompt in prompts)
NUM_TOKENS = 96
NUM_TOKENS_OF_KIND = 40  # enough to see which experts a kind of text uses
REFRESH_PER_SECOND = 8


def run_demo(config: MobulaConfig, console: Console) -> int:
    """The whole show. Returns the command's exit status."""
    logging.basicConfig(level=logging.WARNING)
    treat_sigterm_as_ctrl_c()
    try:
        _run(config, console)
    except START_ERRORS as error:
        console.print(f"[bold red]error:[/bold red] {escape(str(error))}", highlight=False)
        return 1
    except grpc.RpcError as error:
        console.print(
            f"[bold red]error:[/bold red] {error.code().name}: {escape(error.details() or '')}", highlight=False
        )
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; stopped")
        return INTERRUPTED
    return 0


def _run(config: MobulaConfig, console: Console) -> None:
    start = time.monotonic()
    deployment = Deployment(config)
    console.rule("[bold]1. start")
    console.print(plan_view(deployment.plan))
    with deployment:
        treat_sigterm_as_ctrl_c()  # again: Ray, when it starts, puts its own handler in place
        with StartProgress(console) as progress:
            status = deployment.wait_until_serving(progress.show)
        console.print(
            f"serving after {time.monotonic() - start:.1f} s: {len(status.processes)} processes on one Ray cluster"
        )

        console.rule(f"[bold]2. {len(PROMPTS)} prompts at once over gRPC")
        with InferenceClient(deployment.address) as client:
            generations = [Generation(prompt) for prompt in PROMPTS]
            with Live(
                console=console,
                refresh_per_second=REFRESH_PER_SECOND,
                get_renderable=lambda: streams_view(generations, console.width),
            ):
                wall_s = _stream(client, generations)
            console.print()
            console.print(summary_view(generations, wall_s))

            console.rule("[bold]3. where every token went")
            console.print(experts_view(client.expert_load(), client.placement(), console.width))
            console.print()
            with console.status("the same prompts again, one kind at a time ..."):
                load_by_kind = {kind: _load_of(client, prompts) for kind, prompts in PROMPTS_BY_KIND.items()}
            console.print(kinds_view(load_by_kind, console.width))
        children = psutil.Process().children(recursive=True)
        console.rule("[bold]4. stop")
    left = [child for child in psutil.wait_procs(children, timeout=10)[1] if child.status() != psutil.STATUS_ZOMBIE]
    console.print(
        f"all stopped: {len(left)} processes left, {time.monotonic() - start:.0f} s in all; next: make serve",
        soft_wrap=True,
    )


def _stream(client: InferenceClient, generations: list[Generation], num_tokens: int = NUM_TOKENS) -> float:
    """Continues every prompt at once, in place. Returns the seconds it took. Raises the first call's error."""
    failures: list[BaseException] = []

    def stream(index: int) -> None:
        params = generation_pb2.SamplingParams(
            temperature=0.6, top_p=0.9, seed=index, max_tokens=num_tokens, ignore_eos=True
        )
        try:
            for generation in client.generate(generations[index].prompt, params):
                generations[index] = generation
        except grpc.RpcError as error:
            failures.append(error)

    threads = [
        threading.Thread(target=stream, args=(index,), name=f"demo-{index}") for index in range(len(generations))
    ]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return time.monotonic() - start


def _load_of(client: InferenceClient, prompts: tuple[str, ...]) -> generation_pb2.GetExpertLoadResponse:
    """What these prompts alone add to the experts' load."""
    before = client.expert_load()
    _stream(client, [Generation(prompt) for prompt in prompts], NUM_TOKENS_OF_KIND)
    load = client.expert_load()
    for layer, old in zip(load.layers, before.layers, strict=True):
        layer.num_tokens[:] = [now - then for now, then in zip(layer.num_tokens, old.num_tokens, strict=True)]
    return load
