"""`mobula chaos`: what a fault costs, shown on a system of this machine."""

import json
import signal
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from cluster.chaos.catalog import SCENARIOS
from cluster.chaos.deployment import LocalDeployment
from cluster.chaos.fault import Fault
from cluster.chaos.run import RunConfig, RunResult, run_fault
from cluster.chaos.system import ChaosRefused, System
from cluster.client_access import ClientAccess
from cluster.commands.arguments import MAX_UINT32
from cluster.commands.chaos_view import ChaosProgress, result_view, scenarios_view
from cluster.commands.terminal import console, fail
from cluster.config import ConfigError, read_config
from cluster.controller.controller import StartError

app = typer.Typer(no_args_is_help=True, help="Break something under load and measure what it costs.")


@app.command("list")
def list_faults() -> None:
    """Show the faults by name."""
    console.print(scenarios_view())


@app.command()
def run(
    name: Annotated[str, typer.Argument(help="Of the fault; `mobula chaos list` shows them.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object.")] = False,
    seconds: Annotated[float, typer.Option(min=1.0, help="Of load after the fault, at least.")] = 10.0,
    seed: Annotated[
        int,
        typer.Option(min=0, help="Chooses the process that is met, the order of requests, and the fault of `random`."),
    ] = 0,
    clients: Annotated[int, typer.Option(min=1, max=256, help="That stream at the same time.")] = 8,
    tokens: Annotated[int, typer.Option(min=8, max=MAX_UINT32, help="Of each answer.")] = 96,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="What to change in the system that is started.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="A running system's gateway on this machine, instead of starting one; it is damaged."),
    ] = None,
) -> None:
    """Start a system on this machine, break something under load, show what it cost, stop it.

    The exit status is 1 when a request failed or its tokens changed.
    """
    if name not in SCENARIOS:
        fail(f"there is no fault {name}; there are: {', '.join(SCENARIOS)}")
    if config is not None and address is not None:
        fail("--config is for a system that is started; with --address one runs already")
    run_config = RunConfig(seconds=seconds, num_clients=clients, max_tokens=tokens, seed=seed)
    fault = SCENARIOS[name].create(seed)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends in order, as Ctrl-C
    try:
        with ChaosProgress(console, is_shown=not as_json) as progress:
            result = _run(fault, address, _settings(config), run_config, progress)
    except (ChaosRefused, ConfigError, StartError) as error:
        fail(str(error))
    if as_json:
        typer.echo(json.dumps({"name": name, "seed": seed, **asdict(result.report), "notes": result.notes}))
    else:
        console.print(result_view(name, result))
    if not result.report.is_good:
        raise typer.Exit(1)


def _run(
    fault: Fault, address: str | None, settings: dict[str, Any], config: RunConfig, progress: ChaosProgress
) -> RunResult:
    with ExitStack() as stack:
        if address is not None:
            if fault.needs_own_deployment:
                raise ChaosRefused("this fault needs a system that is started for it; leave out --address")
            return run_fault(
                fault, stack.enter_context(System(address, ClientAccess.from_environment())), config, progress.show
            )
        stack.callback(fault.close)
        deployment = stack.enter_context(LocalDeployment())
        progress.show("starting a system", 0.0)
        system = stack.enter_context(deployment.start(fault.prepare(deployment.folder), settings))
        return run_fault(fault, system, config, progress.show)


def _settings(path: Path | None) -> dict[str, Any]:
    """A user's, as they stand in the file, so that only what it says replaces the run's own. Raises ConfigError."""
    if path is None:
        return {}
    read_config(path)  # says what is wrong with it
    settings: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    return settings
