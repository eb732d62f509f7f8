"""`mobula serve`: starts the system, says how to call it, and ends it in order."""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from cluster.checkpoint.checkpoint import InvalidCheckpoint
from cluster.checkpoint.json_fields import UnsupportedModel
from cluster.client import DEFAULT_ADDRESS
from cluster.commands.event_lines import EventLines
from cluster.commands.plan_view import plan_view
from cluster.commands.progress import StartProgress
from cluster.commands.terminal import INTERRUPTED
from cluster.config import ConfigError, MobulaConfig
from cluster.controller.controller import StartError
from cluster.logs import log_to_stderr, print_lines
from cluster.roles.launch import Deployment
from cluster.security.exposure import exposures
from protos.certificates import AUTHORITY
from router.placement import PlacementError

WATCH_S = 1.0  # how often it looks at the system's status
START_ERRORS = (ConfigError, InvalidCheckpoint, UnsupportedModel, PlacementError, StartError)


def serve_until_stopped(config: MobulaConfig, console: Console) -> int:
    """Runs until Ctrl-C or SIGTERM. Returns the command's exit status."""
    events = EventLines()
    log_to_stderr(config.logging, "serve", lambda: events.placement_version)
    print_lines(config.logging, "serve", lambda: events.placement_version)
    treat_sigterm_as_ctrl_c()
    try:
        for exposure in exposures(config):
            console.print(f"[bold yellow]open:[/bold yellow] {escape(exposure)}", highlight=False, soft_wrap=True)
        deployment = Deployment(config)
        console.print(plan_view(deployment.plan))
        with deployment:
            treat_sigterm_as_ctrl_c()  # again: Ray, when it starts, puts its own handler in place
            with StartProgress(console) as progress:
                deployment.wait_until_serving(progress.show)
            _print_banner(deployment, console)
            _watch_until_signal(deployment, events)
            console.print("stopping: requests in flight may end; Ctrl-C again stops at once", soft_wrap=True)
    except START_ERRORS as error:
        console.print(f"[bold red]error:[/bold red] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted before the system was up; stopped")
        return INTERRUPTED
    console.print("stopped")
    return 0


def _print_banner(deployment: Deployment, console: Console) -> None:
    address, model = escape(deployment.address), escape(deployment.config.model)
    mobula = escape(f"{_command()}{_access_options(deployment.config)}")
    page = f"{'https' if deployment.config.tls.metrics else 'http'}://{escape(deployment.metrics_address)}"
    option = "" if deployment.address == DEFAULT_ADDRESS else f" --address {address}"
    console.print(f"\n[bold green]serving[/bold green] {model} at [bold]{address}[/bold]", highlight=False)
    console.print(f"  try:      {mobula} generate 'def main():'{option}", highlight=False, soft_wrap=True)
    console.print(f"  experts:  {mobula} experts{option}", highlight=False, soft_wrap=True)
    console.print(f"  status:   {mobula} status{option}", highlight=False, soft_wrap=True)
    if deployment.config.gateway.dashboard:
        console.print(f"  watch:    {page}/", highlight=False)
    console.print(f"  metrics:  {page}/metrics", highlight=False)
    console.print("  stop:     Ctrl-C\n")


def _access_options(config: MobulaConfig) -> str:
    """What clients need to show or believe, as options of the command."""
    options = ""
    if config.tls.clients:
        options += f" --tls-ca {Path(config.tls.clients) / AUTHORITY}"
    if config.tls.require_client_certificate:
        options += " --cert FILE --key FILE"
    return options + (" --api-key-file FILE" if config.gateway.keys else "")


def _command() -> str:
    """How this command was called, so that the printed ones can be called alike."""
    called = sys.argv[0]
    return "mobula" if shutil.which("mobula") == called else os.path.relpath(called)


def treat_sigterm_as_ctrl_c() -> None:
    """In this process, from now on."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


def _watch_until_signal(deployment: Deployment, events: EventLines) -> None:
    """Returns at Ctrl-C. Raises StartError when the controller is gone."""
    try:
        while True:
            events.observe(deployment.status())
            time.sleep(WATCH_S)
    except KeyboardInterrupt:
        return
