from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.expert_choice import choose_experts
from attention.layers import TorchProjection
from router.gate import select_experts
from router.gate_config import GateConfig, TopkMethod
from router.overload_valve import OverloadValve
from router.plan import NO_EXPERT
from router.router_config import CapacityPolicy, RouterConfig
from tests.router.test_gate import V2, V2_LITE, V3, V3_OF_ONE
from tests.router.test_published_gates import GSHARD, MIXTRAL, SWITCH

PUBLISHED_V3 = replace(V3, n_routed_experts=256, n_group=8, topk_group=4)
CONFIGS = {
    "v2": V2,
    "published v2": replace(V2, n_routed_experts=160),
    "v2_lite": V2_LITE,
    "normalised": replace(V2_LITE, n_routed_experts=64, norm_topk_prob=True),
    "v3": V3,
    "published v3": PUBLISHED_V3,
    "v3 with one expert a token": V3_OF_ONE,
}
ALL = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@ALL
@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), num_tokens=st.integers(1, 70), has_ties=st.booleans())
def test_the_choice_is_that_of_the_gate_in_torch(
    config: GateConfig, seed: int, num_tokens: int, has_ties: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, config.n_routed_experts, generator=generator)
    bias = (
        0.1 * torch.randn(config.n_routed_experts, generator=generator)
        if config.topk_method is TopkMethod.NOAUX_TC
        else None
    )
    if has_ties:
        logits, bias = logits.round(), None
    identity = TorchProjection(torch.eye(config.n_routed_experts))
    weights, ids = choose_experts(logits, identity, config, bias)
    expected_weights, expected_ids = select_experts(logits, config, bias)
    same = (ids == expected_ids).all(dim=1)
    # Where two scores differ by rounding alone either choice is right; that is rare.
    assert same.float().mean() > 0.9 or num_tokens < 10
    torch.testing.assert_close(weights[same], expected_weights[same], rtol=1e-5, atol=1e-7)
    assert has_ties or bool(same.all())


@ALL
def test_a_rows_choice_does_not_depend_on_the_rows_beside_it(config: GateConfig, num_threads: int) -> None:
    logits = torch.randn(100, config.n_routed_experts)
    identity = TorchProjection(torch.eye(config.n_routed_experts))
    weights, ids = choose_experts(logits, identity, config, None)
    for row in (0, 31, 99):
        alone_weights, alone_ids = choose_experts(logits[row : row + 1], identity, config, None)
        assert torch.equal(alone_weights[0], weights[row])
        assert torch.equal(alone_ids[0], ids[row])


@pytest.mark.parametrize("config", [MIXTRAL, GSHARD, SWITCH], ids=["mixtral", "gshard", "switch"])
def test_gates_that_have_no_kernel_are_computed_by_torch(config: GateConfig) -> None:
    logits = torch.randn(40, config.n_routed_experts, generator=torch.Generator().manual_seed(1))
    weights, ids = choose_experts(logits, TorchProjection(torch.eye(config.n_routed_experts)), config, None)
    expected_weights, expected_ids = select_experts(logits, config)
    assert torch.equal(ids, expected_ids)
    assert torch.equal(weights, expected_weights)


def test_the_valve_comes_after_the_gate_and_leaves_weights_as_they_are() -> None:
    logits = torch.zeros(20, V2.n_routed_experts)
    identity = TorchProjection(torch.eye(V2.n_routed_experts))
    weights, ids = choose_experts(logits, identity, V2, None)
    dropped: list[int] = []
    config = RouterConfig(capacity_policy=CapacityPolicy.SWITCH, min_capacity=5)
    limited_weights, limited = choose_experts(logits, identity, V2, None, OverloadValve(config, V2, dropped.append))
    assert torch.equal(limited_weights, weights)
    assert torch.equal(limited[:5], ids[:5])  # all tokens choose the same six experts
    assert (limited[5:] == NO_EXPERT).all()
    assert dropped == [15 * 6]
