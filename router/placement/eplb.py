"""The policy `eplb`: DeepSeek's expert-parallel load balancer; units are single experts.

`rebalance_experts` is the published algorithm (DeepSeek-V3, arXiv 2412.19437, section 3.4; deepseek-ai/EPLB), to the
bit. It balances finer than whole groups do, and does not keep the device limit.

    logical expert   an expert as the model defines it
    physical expert  a slot on a shard that holds a replica of a logical expert; slots ascend with the shards
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from router.expert_map import Int64Array
from router.placement.request import Placement, PlacementDoesNotFit, PlacementError, PlacementRequest
from router.placement.slots import spread_replicas
from router.placement.units import load_or_even, weight_limits

Float32Array = npt.NDArray[np.float32]


class Rebalanced(NamedTuple):
    """What the published function returns.

    physical_to_logical: [num_layers, num_physical]; logical_to_physical: [num_layers, num_logical, most replicas],
    -1 pads; logical_counts, replicas: [num_layers, num_logical].
    """

    physical_to_logical: Int64Array
    logical_to_physical: Int64Array
    logical_counts: Int64Array


def place(request: PlacementRequest) -> Placement:
    """As published, then repaired where two replicas of an expert came to lie on one shard (slots.spread_replicas).

    Every shard gets the same number of experts of each layer: the experts, num_replicas times, and the redundancy,
    rounded up to a multiple of ep_size, or down where only that fits. Hierarchical, groups packed on failure domains,
    where domains are of one size, divide the groups, have places enough for replicas on different shards, and each unit
    needs only one; global elsewhere. Reads
    neither speeds nor the current map. Raises PlacementError, PlacementDoesNotFit.
    """
    num_experts = request.gate.n_routed_experts
    if request.units_per_layer not in (None, num_experts) and not request.gate.is_group_limited:
        raise PlacementError(
            f"units_per_layer is {request.units_per_layer}, but units of eplb are single experts: leave it unset"
        )
    per_shard = _slots_per_shard(request)
    num_physical = per_shard * request.ep_size
    order, domains = _shards_by_domain(request)
    num_domains = int(domains.max()) + 1
    is_hierarchical = (
        request.num_replicas == 1
        and num_domains > 1
        and len(set(np.bincount(domains).tolist())) == 1
        and request.gate.n_group % num_domains == 0
        and num_physical // num_domains <= num_experts // num_domains * (request.ep_size // num_domains)
    )
    load = load_or_even(request)
    if is_hierarchical:
        num_groups, num_nodes = request.gate.n_group, num_domains
    else:
        num_groups, num_nodes = 1, 1
    most = request.ep_size // num_nodes
    rebalanced = rebalance_experts(
        load, num_physical, num_groups, num_nodes, request.ep_size, request.num_replicas, most
    )
    slots = rebalanced.physical_to_logical.reshape(len(load), request.ep_size, per_shard)
    min_domains = min(2, request.num_replicas, num_domains)
    slots = spread_replicas(slots, load / rebalanced.logical_counts, domains[order], min_domains)
    return Placement(
        expert_to_unit=np.tile(np.arange(num_experts), (len(load), 1)),
        unit_to_ep_ranks=_unit_to_ep_ranks(slots, order, rebalanced.logical_counts),
    )


def _slots_per_shard(request: PlacementRequest) -> int:
    """Of each layer."""
    num_experts, ep_size = request.gate.n_routed_experts, request.ep_size
    wanted = num_experts * request.num_replicas + int(num_experts * request.redundancy + 1e-9)
    wanted = min(wanted, num_experts * ep_size)
    per_shard, least = -(-wanted // ep_size), -(-num_experts * request.num_replicas // ep_size)
    limits = weight_limits(request)
    if limits is not None and request.expert_bytes:
        fits = int(limits.min()) // (request.expert_bytes * request.num_layers)
        if fits < least:
            raise PlacementDoesNotFit(
                f"eplb gives each shard {least} experts of each of {request.num_layers} layers, "
                f"{least * request.num_layers * request.expert_bytes} bytes; the smallest limit is {limits.min()} "
                f"bytes: use more than {ep_size} shards, fewer replicas, a smaller dtype or a higher limit"
            )
        per_shard = min(per_shard, fits)
    return per_shard


def _shards_by_domain(request: PlacementRequest) -> tuple[Int64Array, Int64Array]:
    """Shards in order of their domains, [ep_size], and the domain of each shard, [ep_size] from 0."""
    _, domains = np.unique(np.asarray(request.shard_domains or ("",) * request.ep_size), return_inverse=True)
    return np.argsort(domains, kind="stable"), domains


def _unit_to_ep_ranks(slots: Int64Array, order: Int64Array, counts: Int64Array) -> Int64Array:
    """slots: [num_layers, ep_size, per_shard], shards in `order`. Returns [num_layers, num_experts, max_replicas]."""
    num_layers, num_experts = counts.shape
    ep_size = len(order)
    holds = np.zeros((num_layers, num_experts, ep_size), dtype=np.bool_)
    holds[np.arange(num_layers)[:, None, None], slots, order[:, None]] = True
    ranks = np.where(holds, np.arange(ep_size), ep_size)
    ranks.sort(axis=2)
    ranks = ranks[:, :, : int(counts.max())]
    return np.where(ranks == ep_size, -1, ranks)


def rebalance_experts(
    load: npt.NDArray[np.float64],
    num_physical: int,
    num_groups: int,
    num_nodes: int,
    num_shards: int,
    min_replicas: int = 1,
    max_replicas: int | None = None,
) -> Rebalanced:
    """The published algorithm; with num_groups = num_nodes = 1 its global form.

    load: [num_layers, num_logical]. Groups are packed on nodes, experts replicated within each node, replicas packed
    on the node's shards. Sums and ties as published: float32, equal weights in order of their index. Ours are
    min_replicas, of each expert before the hottest get more, and max_replicas, of any: more than the shards of a node
    could not lie apart.
    """
    num_layers, num_logical = load.shape
    weight: Float32Array = load.astype(np.float32)
    group_size, groups_per_node = num_logical // num_groups, num_groups // num_nodes
    logical_per_node, physical_per_node = num_logical // num_nodes, num_physical // num_nodes
    shards_per_node = num_shards // num_nodes
    # Groups to nodes: experts in the order in which nodes hold them, [num_layers, num_logical].
    group_weight: Float32Array = weight.reshape(num_layers, num_groups, group_size).sum(axis=-1)
    node, rank = pack_evenly(group_weight, num_nodes)
    first = (node * groups_per_node + rank) * group_size
    place_of = (first[:, :, None] + np.arange(group_size)).reshape(num_layers, num_logical)
    by_node = np.argsort(place_of, axis=1)
    # Replicas within each node; a row is a (layer, node).
    weight = weight[np.arange(num_layers)[:, None], by_node].reshape(-1, logical_per_node)
    replica_of, replica_rank, counts = replicate(weight, physical_per_node, min_replicas, max_replicas)
    # Replicas to the node's shards.
    share = np.asarray(weight / counts.astype(np.float32), dtype=np.float32)[
        np.arange(len(weight))[:, None], replica_of
    ]
    shard, rank = pack_evenly(share, shards_per_node)
    slot_of = shard * (physical_per_node // shards_per_node) + rank
    item_in = np.argsort(slot_of, axis=1)  # what each slot of a node takes, [rows, physical_per_node]
    in_slots = np.take_along_axis(replica_of, item_in, axis=1).reshape(num_layers, num_nodes, physical_per_node)
    in_slots = in_slots + np.arange(0, num_logical, logical_per_node)[:, None]
    physical_to_logical = np.take_along_axis(by_node, in_slots.reshape(num_layers, num_physical), axis=1)
    rank = np.take_along_axis(replica_rank, item_in, axis=1).reshape(num_layers, num_physical)
    logical_to_physical = np.full((num_layers, num_logical, int(counts.max())), -1)
    logical_to_physical[np.arange(num_layers)[:, None], physical_to_logical, rank] = np.arange(num_physical)
    counts = np.take_along_axis(counts.reshape(num_layers, num_logical), place_of, axis=1)
    return Rebalanced(physical_to_logical, logical_to_physical, counts)


def pack_evenly(weight: Float32Array, num_packs: int) -> tuple[Int64Array, Int64Array]:
    """Packs items so that packs hold equally many: heaviest first, each into the lightest pack that has room.

    weight: [num_rows, num_items]. Returns the pack of each item and its place in the pack, both the shape of weight.
    """
    num_rows, num_items = weight.shape
    capacity = num_items // num_packs
    pack, place_in_pack = np.zeros(weight.shape, np.int64), np.zeros(weight.shape, np.int64)
    if capacity == 1:
        pack[:] = np.arange(num_items)
        return pack, place_in_pack
    rows = np.arange(num_rows)
    total, num_held = np.zeros((num_rows, num_packs), np.float32), np.zeros((num_rows, num_packs), np.int64)
    for item in np.argsort(-weight, axis=1, kind="stable").T:  # [num_rows], another in each row
        lightest = np.where(num_held < capacity, total, np.inf).argmin(axis=1)
        pack[rows, item], place_in_pack[rows, item] = lightest, num_held[rows, lightest]
        total[rows, lightest] += weight[rows, item]
        num_held[rows, lightest] += 1
    return pack, place_in_pack


def replicate(
    weight: Float32Array, num_physical: int, min_replicas: int = 1, max_replicas: int | None = None
) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Again and again one more replica of the expert whose replicas carry most.

    weight: [num_rows, num_logical]. Returns the expert of each physical one and which of the expert's replicas it is,
    [num_rows, num_physical] both, and the replicas of each expert, [num_rows, num_logical].
    """
    num_rows, num_logical = weight.shape
    replica_of = np.tile(np.arange(num_physical) % num_logical, (num_rows, 1))
    replica_rank = np.tile(np.arange(num_physical) // num_logical, (num_rows, 1))
    counts = np.full(weight.shape, min_replicas, np.int64)
    rows = np.arange(num_rows)
    for physical in range(num_logical * min_replicas, num_physical):
        carried = weight / counts.astype(np.float32)
        if max_replicas is not None:
            carried[counts >= max_replicas] = -1.0
        hottest = carried.argmax(axis=1)
        replica_of[:, physical], replica_rank[:, physical] = hottest, counts[rows, hottest]
        counts[rows, hottest] += 1
    return replica_of, replica_rank, counts
