"""`mobula scale shards|workers`, `mobula drain shard|worker`: how many processes there are, while they serve."""

from collections.abc import Mapping, Sequence
from typing import Annotated

import grpc
import typer

from cluster.client import DEFAULT_ADDRESS, AdminClient
from cluster.commands.arguments import MAX_UINT32, Address, within
from cluster.commands.terminal import console, fail_call
from cluster.config import MAX_COUNT
from cluster.process_names import listed
from protos import admin_pb2

SEE = "`mobula status` shows how far it is"
COUNT = within(1, MAX_COUNT, "`mobula status` shows how many there are")
RANK = within(0, MAX_UINT32, "`mobula status` shows the numbers that there are")
COMING = {  # what one does, and what several do
    "shard": ("starts and is then given units", "start and are then given units"),
    "worker": ("starts and is then given requests", "start and are then given requests"),
}
LEAVING = {
    "shard": ("gives up its units and then ends", "give up their units and then end"),
    "worker": ("hands its requests over and then ends", "hand their requests over and then end"),
}

# So that -1 is told as what it is, and not as an option that there is none of.
TAKES_NEGATIVE = {"ignore_unknown_options": True}

scale_app = typer.Typer(no_args_is_help=True, help="Change how many processes there are, while requests run.")
drain_app = typer.Typer(no_args_is_help=True, help="Let one process end without a request noticing.")


@scale_app.command("shards", context_settings=TAKES_NEGATIVE)
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
    _tell("shard", count, change.added_ep_ranks, change.drained_ep_ranks)


@scale_app.command("workers", context_settings=TAKES_NEGATIVE)
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
    _tell("worker", count, change.added_dp_ranks, change.drained_dp_ranks)


@drain_app.command("shard", context_settings=TAKES_NEGATIVE)
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
    _tell_change("shard", [ep_rank], LEAVING)


@drain_app.command("worker", context_settings=TAKES_NEGATIVE)
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
    _tell_change("worker", [dp_rank], LEAVING)


def _tell(role: str, count: int, added: Sequence[int], drained: Sequence[int]) -> None:
    if not added and not drained:
        there_are = f"there are {count} {role}s" if count > 1 else f"there is 1 {role}"
        console.print(f"{there_are} already", highlight=False)
    for ranks, change in ((added, COMING), (drained, LEAVING)):
        if ranks:
            _tell_change(role, ranks, change)


def _tell_change(role: str, ranks: Sequence[int], change: Mapping[str, tuple[str, str]]) -> None:
    of_one, of_several = change[role]
    does = of_one if len(ranks) == 1 else of_several
    console.print(f"{listed(role, ranks)} {does}; {SEE}", highlight=False, soft_wrap=True)
