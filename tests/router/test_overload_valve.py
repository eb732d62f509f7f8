import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from router.gate import select_experts
from router.gate_config import GateConfig
from router.overload_valve import OverloadValve
from router.plan import NO_EXPERT
from router.router_config import CapacityPolicy, RouterConfig
from tests.router import naive_gates
from tests.router.test_gate import V2, V2_LITE, V3

POLICIES = [policy for policy in CapacityPolicy if policy is not CapacityPolicy.DROPLESS]


def valve_of(
    policy: CapacityPolicy, gate: GateConfig, factor: float, minimum: int = 1
) -> tuple[OverloadValve, list[int]]:
    dropped: list[int] = []
    config = RouterConfig(capacity_policy=policy, capacity_factor=factor, min_capacity=minimum)
    return OverloadValve(config, gate, dropped.append), dropped


def naive_kept(
    policy: CapacityPolicy, gate: GateConfig, ids: Tensor, logits: Tensor, factor: float, minimum: int
) -> set[tuple[int, int]]:
    takers = gate.n_group if policy is CapacityPolicy.DEVICE_DROP else gate.n_routed_experts
    limit = minimum
    while limit * takers < ids.numel() * factor:
        limit += 1
    scores = logits.sigmoid() if gate.scoring_func.value == "sigmoid" else logits.softmax(dim=-1)
    affinities = scores.gather(1, ids).tolist()
    if policy is CapacityPolicy.SWITCH:
        return naive_gates.kept_by_switch(ids.tolist(), limit)
    if policy is CapacityPolicy.GSHARD:
        return naive_gates.kept_by_gshard(ids.tolist(), affinities, limit)
    devices = [expert // gate.experts_per_group for expert in range(gate.n_routed_experts)]
    return naive_gates.kept_by_device(ids.tolist(), affinities, devices, limit)


def test_the_default_is_no_valve_at_all() -> None:
    assert OverloadValve.wanted(RouterConfig(), V2, print) is None
    config = RouterConfig(capacity_policy=CapacityPolicy.SWITCH)
    assert isinstance(OverloadValve.wanted(config, V2, print), OverloadValve)


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=60)
@given(
    gate=st.sampled_from([V2, V2_LITE, V3]),
    num_tokens=st.integers(0, 40),
    factor=st.sampled_from([0.25, 0.5, 1.0, 1.25]),
    minimum=st.integers(1, 8),
    seed=st.integers(0, 2**31),
)
def test_what_is_left_out_and_counted_is_what_a_loop_says(
    policy: CapacityPolicy, gate: GateConfig, num_tokens: int, factor: float, minimum: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # All tokens like the same experts; logits of eighths give ties.
    liking = torch.randn(gate.n_routed_experts, generator=generator)
    logits = ((liking + torch.randn(num_tokens, gate.n_routed_experts, generator=generator)) * 8).round() / 8
    _, ids = select_experts(logits, gate)
    valve, dropped = valve_of(policy, gate, factor, minimum)
    limited = valve.limit(ids, logits)
    kept = naive_kept(policy, gate, ids, logits, factor, minimum)
    assert {(token, column) for token, column in (limited != NO_EXPERT).nonzero().tolist()} == kept
    assert torch.equal(limited[limited != NO_EXPERT], ids[limited != NO_EXPERT])
    num_dropped = ids.numel() - len(kept)
    assert dropped == ([num_dropped] if num_dropped else [])
    assert limited is ids or num_dropped


@pytest.mark.parametrize("policy", POLICIES)
def test_a_step_of_few_rows_overloads_nobody(policy: CapacityPolicy) -> None:
    logits = torch.zeros(2, V2.n_routed_experts)  # both choose the same experts
    _, ids = select_experts(logits, V2)
    valve, dropped = valve_of(policy, V2, factor=1.0, minimum=8)
    assert valve.limit(ids, logits) is ids
    assert dropped == []
    tight, dropped = valve_of(policy, V2, factor=1.0)
    assert (tight.limit(ids, logits) == NO_EXPERT).any()
    assert len(dropped) == 1
