"""Experts whose right answers are known: expert k multiplies by k + 1, so that a misrouted token shows."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from prometheus_client import CollectorRegistry
from torch import Tensor

from experts.batcher import ForwardOutput
from experts.forward_frame import answer_frame
from experts.grouped_ffn import ForwardInput, grouped_ffn
from experts.metrics import ShardMetrics
from experts.shard import ExpertShard, ShardConfig
from experts.weight_store import ExpertModel, Unit, WeightStore
from protos import expert_pb2
from protos.codec import decode_frame, dtype_from_wire
from protos.errors import MobulaError, ShardUnavailable
from protos.memory import as_tensor
from protos.poller import Poller
from router.expert_map import ExpertMap
from router.gate import select_experts
from router.gate_config import GateConfig, TopkMethod
from router.metrics import RouterMetrics
from router.placement import PlacementRequest, place_units
from router.router import Router
from router.router_config import RouterConfig
from router.transport import ShardTransport
from tests.payload_reader import PayloadReader

MOE_LAYER_IDS = (1, 2, 4)


def grouped_gate(n_group: int = 8, topk_group: int = 3) -> GateConfig:
    """DeepSeek-V2's shape, small: 16 experts in 8 groups, 4 of at most 3 groups a token."""
    return GateConfig(
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=n_group,
        topk_group=topk_group,
        topk_method=TopkMethod.GROUP_LIMITED_GREEDY,
    )


def greedy_gate() -> GateConfig:
    """V2-Lite's shape, small: no groups."""
    return GateConfig(n_routed_experts=16, num_experts_per_tok=4)


def placed(gate: GateConfig, ep_size: int, num_replicas: int = 1, placement_version: int = 1) -> ExpertMap:
    request = PlacementRequest(moe_layer_ids=MOE_LAYER_IDS, gate=gate, ep_size=ep_size, num_replicas=num_replicas)
    return place_units(request, placement_version)


def random_placement(gate: GateConfig, ep_size: int, seed: int, placement_version: int = 1) -> ExpertMap:
    """The static placement's units, each on a random non-empty set of shards."""
    static = placed(gate, 1)
    rng = np.random.default_rng(seed)
    unit_to_ep_ranks = np.full((len(MOE_LAYER_IDS), static.num_units, ep_size), -1)
    for layer_row in unit_to_ep_ranks:
        for ranks in layer_row:
            count = rng.integers(1, ep_size + 1)
            ranks[:count] = rng.permutation(ep_size)[:count]
    return ExpertMap(
        placement_version=placement_version,
        ep_size=ep_size,
        moe_layer_ids=MOE_LAYER_IDS,
        expert_to_unit=static.expert_to_unit.copy(),
        unit_to_ep_ranks=unit_to_ep_ranks,
    )


@dataclass(frozen=True)
class Rows:
    """One layer's input."""

    hidden_states: Tensor
    topk_weights: Tensor
    topk_ids: Tensor


def random_rows(
    gate: GateConfig, num_tokens: int, hidden_size: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, gate.n_routed_experts, generator=generator)
    hidden_states = torch.randn(num_tokens, hidden_size, generator=generator).to(dtype)
    return Rows(hidden_states, *select_experts(logits, gate))


def multiplied(rows: Rows) -> Tensor:
    """What experts that multiply by k + 1 make of the rows, fp32."""
    factors = (rows.topk_weights * (rows.topk_ids + 1)).sum(dim=-1, keepdim=True)
    return rows.hidden_states.float() * factors


class MultiplyingShard:
    """Answers frames; checks nothing. `fail_next` raises the given errors before it answers again.

    factor: that its sums are multiplied by as well.
    """

    def __init__(self, placement_versions: tuple[int, ...] = (1,)) -> None:
        self.placement_versions = placement_versions
        self.frames: list[bytes] = []
        self.fail_next: list[MobulaError] = []
        self.factor = 1.0

    def __call__(self, frame: bytes) -> Future[bytes]:
        self.frames.append(frame)
        header, payload = decode_frame(expert_pb2.ForwardHeader, frame)
        answer: Future[bytes] = Future()
        if self.fail_next:
            error = self.fail_next.pop(0)
            if isinstance(error, ShardUnavailable):  # the connection's failure, not the shard's answer
                answer.set_exception(error)
            else:
                answer.set_result(answer_frame(header.sequence_number, error))
            return answer
        reader = PayloadReader(payload)
        hidden_size = (len(payload) - 16 * header.num_assignments) // max(header.num_rows, 1)
        dtype = dtype_from_wire(header.dtype)
        hidden_states = reader.take((header.num_rows, hidden_size // dtype.itemsize), dtype)
        weights = reader.take((header.num_assignments,), torch.float32)
        rows, expert_ids, partial_sums = (reader.take((header.num_assignments,), torch.int32) for _ in range(3))
        reader.finish()
        sums = torch.zeros(header.num_partial_sums, hidden_states.shape[1])
        sums.index_add_(0, partial_sums, hidden_states.float()[rows] * (weights * (expert_ids + 1)).unsqueeze(-1))
        output = ForwardOutput(partial_sums=(self.factor * sums).to(hidden_states.dtype), queue_ns=0, compute_ns=0)
        answer.set_result(answer_frame(header.sequence_number, output))
        return answer


def router_to(
    gate: GateConfig,
    expert_map: ExpertMap,
    connect: Callable[[str], ShardTransport],
    *,
    config: RouterConfig | None = None,
    addresses: dict[int, str] | None = None,
    registry: CollectorRegistry | None = None,
    poller: Poller | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Router:
    """Shard r's address is str(r) unless `addresses` says otherwise."""
    return Router(
        config=config or RouterConfig(forward_timeout_s=20.0, attempt_timeout_s=10.0),
        gate=gate,
        expert_map=expert_map,
        addresses={rank: str(rank) for rank in range(expert_map.ep_size)} if addresses is None else addresses,
        connect=connect,
        metrics=RouterMetrics(registry or CollectorRegistry(), dp_rank=0),
        poller=poller,
        clock=clock,
    )


class RandomReader:
    """A checkpoint of routed experts whose tensors follow from their names."""

    def __init__(self, model: ExpertModel) -> None:
        self.model = model
        self.names_read: list[str] = []

    def shape(self, name: str) -> tuple[int, ...]:
        sizes = (self.model.moe_intermediate_size, self.model.hidden_size)
        return sizes[::-1] if "down_proj" in name else sizes

    def read_matrix(self, name: str) -> Tensor:
        return self.read(name)

    def read(self, name: str) -> Tensor:
        self.names_read.append(name)
        seed = int.from_bytes(name.encode()) % (2**61)
        values = torch.randn(self.shape(name), generator=torch.Generator().manual_seed(seed))
        return values.div(self.shape(name)[1] ** 0.5)


def small_model(dtype: torch.dtype = torch.float32, hidden_size: int = 48) -> ExpertModel:
    return ExpertModel(
        moe_layer_ids=MOE_LAYER_IDS, n_routed_experts=16, hidden_size=hidden_size, moe_intermediate_size=24, dtype=dtype
    )


def reference_sums(rows: Rows, layer_id: int, expert_to_unit: np.ndarray, model: ExpertModel) -> Tensor:
    """One row and one unit at a time: what every placement must give to the bit. [num_tokens, hidden_size] fp32."""
    store = WeightStore(model, RandomReader(model))
    store.activate(1, [Unit(layer_id, 0, tuple(range(model.n_routed_experts)))])
    layer = store.layer(1, layer_id)
    assert layer is not None
    total = torch.zeros(rows.hidden_states.shape)
    for row, (weights, expert_ids) in enumerate(zip(rows.topk_weights, rows.topk_ids, strict=True)):
        units = expert_to_unit[expert_ids]
        for unit in sorted(set(units.tolist())):
            places = torch.from_numpy(np.flatnonzero(units == unit))
            zeros = torch.zeros(len(places))
            forward = ForwardInput(
                hidden_states=rows.hidden_states[row : row + 1],
                assignment_bytes=wire_assignments(weights[places], zeros, expert_ids[places], zeros),
                num_partial_sums=1,
            )
            total[row] += as_tensor(grouped_ffn(forward, layer.experts))[0].float()
    return total


def wire_assignments(weights: Tensor, rows: Tensor, expert_ids: Tensor, partial_sums: Tensor) -> bytes:
    """Of [4, A] int32, as a payload has them; each argument has one number an assignment."""
    columns = (weights.float().view(torch.int32), rows.int(), expert_ids.int(), partial_sums.int())
    return torch.stack(columns).numpy().tobytes()


def expert_shard(
    expert_map: ExpertMap, ep_rank: int, model: ExpertModel, max_waiting_forwards: int = 1024
) -> ExpertShard:
    """With its units, not started."""
    shard = ExpertShard(
        ShardConfig(ep_rank=ep_rank, max_waiting_forwards=max_waiting_forwards),
        model,
        RandomReader(model),
        ShardMetrics(CollectorRegistry(), ep_rank),
    )
    shard.activate(expert_map.placement_version, [Unit(*unit) for unit in expert_map.units_of(ep_rank)])
    return shard


@contextmanager
def running_shards(expert_map: ExpertMap, model: ExpertModel) -> Iterator[list[ExpertShard]]:
    shards = [expert_shard(expert_map, ep_rank, model) for ep_rank in range(expert_map.ep_size)]
    for shard in shards:
        shard.start()
    try:
        yield shards
    finally:
        for shard in shards:
            shard.stop()
