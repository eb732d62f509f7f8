"""`mobula scale shards|workers`, `mobula drain shard|worker`: how many processes there are, while they serve."""

from collections.abc import Sequence
from typing import Annotated

import grpc
import typer

from cluster.client import DEFAULT_ADDRESS, AdminClient
from cluster.commands.arguments import MAX_UINT32, Address, within
from cluster.commands.terminal import console, fail_call
from cluster.config import MAX_COUNT
from protos import admin_pb2

SEE = "`mobula status` shows how far it is"
COUNT = within(1, MAX_COUNT, "`mobula status` shows how many there are")
RANK = within(0, MAX_UINT32, "`mobula status` shows the numbers that there are")
COMING = {"shards": "start and are then given units", "workers": "start and are then given requests"}
LEAVING = {"shards": "give up their units and then end", "workers": "hand their requests over and then end"}

scale_app = typer.Typer(no_args_is_help=True, help="Change how many processes there are, while requests run.")
drain_app = typer.Typer(no_args_is_help=True, help="Let one process end without a request noticing.")


@scale_app.command("shards")
def scale_shards(
    count: Annotated[int, typer.Argument(callback=COUNT, help="How many expert shards there shall be.")],
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Start expert shards and give them units, or take units from the last ones and end them."""
    try:
        with AdminClient(address) as client:
            change = client.scale_shards(count)
    except grpc.RpcError as error:
        fail_call(error, address)
    _tell("shards", count, change.added_ep_ranks, change.drained_ep_ranks)


@scale_app.command("workers")
def scale_workers(
    count: Annotated[int, typer.Argument(callback=COUNT, help="How many attention workers there shall be.")],
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Start attention workers, or let others go on with the requests of the last ones and end them."""
    try:
        with AdminClient(address) as client:
            change = client.scale_workers(count)
    except grpc.RpcError as error:
        fail_call(error, address)
    _tell("workers", count, change.added_dp_ranks, change.drained_dp_ranks)


@drain_app.command("shard")
def drain_shard(
    ep_rank: Annotated[int, typer.Argument(callback=RANK, help="The shard's number.")],
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Move a shard's units to the others, then end it. Other shards keep their numbers."""
    try:
        with AdminClient(address) as client:
            client.drain(admin_pb2.PROCESS_ROLE_SHARD, ep_rank)
    except grpc.RpcError as error:
        fail_call(error, address)
    console.print(f"shard {ep_rank} gives up its units and then ends; {SEE}", highlight=False)


@drain_app.command("worker")
def drain_worker(
    dp_rank: Annotated[int, typer.Argument(callback=RANK, help="The worker's number.")],
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Give a worker no new requests, let others go on with those it does not end in time, then end it."""
    try:
        with AdminClient(address) as client:
            client.drain(admin_pb2.PROCESS_ROLE_WORKER, dp_rank)
    except grpc.RpcError as error:
        fail_call(error, address)
    console.print(f"worker {dp_rank} hands its requests over and then ends; {SEE}", highlight=False)


def _tell(role: str, count: int, added: Sequence[int], drained: Sequence[int]) -> None:
    if not added and not drained:
        console.print(f"there are {count} {role} already")
    for ranks, what in ((added, COMING[role]), (drained, LEAVING[role])):
        if ranks:
            console.print(f"{role} {', '.join(map(str, ranks))} {what}; {SEE}", highlight=False)
