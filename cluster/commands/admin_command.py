"""`mobula status` and `mobula rebalance`: what an operator asks a running system."""

import json
import time
from typing import Annotated, Any

import grpc
import typer
from rich.markup import escape

from cluster.client import DEFAULT_ADDRESS, AdminClient
from cluster.commands.admin_views import plan_view, status_view
from cluster.commands.arguments import Address
from cluster.commands.message_fields import plain_fields
from cluster.commands.progress import RebalanceProgress
from cluster.commands.rebalance_watch import Ended, LostSight, Outcome, RebalanceWatch, statuses, wait_until_ended
from cluster.commands.terminal import INTERRUPTED, console, errors, fail, fail_call
from cluster.controller.admin_messages import cluster_status
from protos import admin_pb2

Json = Annotated[bool, typer.Option("--json", help="Print the answer as one JSON object, fields as in admin.proto.")]


def status(address: Address = DEFAULT_ADDRESS, as_json: Json = False) -> None:
    """Show every process, the placement's version and how far a rebalance is."""
    try:
        with AdminClient(address) as client:
            answer = client.status()
            if as_json:
                _print_json(plain_fields(answer))
            else:
                console.print(status_view(cluster_status(answer)))
    except grpc.RpcError as error:
        fail_call(error, address)
    except ValueError as error:
        fail(str(error))


def rebalance(
    address: Address = DEFAULT_ADDRESS,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be moved and gained.")] = False,
    wait: Annotated[
        bool | None, typer.Option("--wait/--no-wait", help="Wait until it is done; unset: on a terminal.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Move experts to where the load of late asks for them, while requests run.

    Shows what each shard reads and what that is expected to gain. The status is 1 when it was aborted.
    """
    is_waiting = console.is_terminal if wait is None else wait
    try:
        with AdminClient(address) as client:
            if dry_run:
                plan = client.rebalance(is_dry_run=True)
                _print_json(plain_fields(plan) | _ending_fields(None)) if as_json else console.print(plan_view(plan))
            else:
                _rebalance(client, is_waiting=is_waiting, as_json=as_json)
    except grpc.RpcError as error:
        fail_call(error, address)
    except ValueError as error:
        fail(str(error))


def _rebalance(client: AdminClient, *, is_waiting: bool, as_json: bool) -> None:
    before = cluster_status(client.status())
    plan = client.rebalance(is_dry_run=False)
    if not as_json:
        console.print(plan_view(plan))
    ended = None
    if plan.started and is_waiting:
        ended = _wait(client, RebalanceWatch(before, plan.new_placement_version), plan, is_shown=not as_json)
    if as_json:
        _print_json(plain_fields(plan) | _ending_fields(ended))
    else:
        console.print(_ending(plan, ended), highlight=False)
    if ended and ended.outcome is Outcome.ABORTED:
        raise typer.Exit(1)


def _wait(client: AdminClient, watch: RebalanceWatch, plan: admin_pb2.RebalanceResponse, *, is_shown: bool) -> Ended:
    """How it ended. Ctrl-C ends the waiting, not the rebalance."""
    polled = statuses(lambda: cluster_status(client.status()), time.monotonic, time.sleep)
    try:
        with RebalanceProgress(console, plan.moved_bytes, is_shown=is_shown) as progress:
            return wait_until_ended(watch, polled, progress.show, time.monotonic)
    except KeyboardInterrupt:
        errors.print("no longer waiting; the rebalance goes on, `mobula status` shows how far it is")
        raise typer.Exit(INTERRUPTED) from None
    except LostSight as error:
        fail(f"{error}; `mobula status` shows how far it is")


def _ending(plan: admin_pb2.RebalanceResponse, ended: Ended | None) -> str:
    if not plan.started:
        return "nothing is moved"
    if ended is None:
        return "begun; `mobula status` shows how far it is"
    style = "green" if ended.outcome is Outcome.DONE else "bold red"
    return f"[{style}]{ended.outcome.value}[/{style}]: {escape(ended.result)}"


def _ending_fields(ended: Ended | None) -> dict[str, Any]:
    """What is not in the answer: how it ended, if that was waited for."""
    return {"outcome": ended.outcome.value if ended else None, "result": ended.result if ended else None}


def _print_json(fields: dict[str, Any]) -> None:
    typer.echo(json.dumps(fields, indent=2))
