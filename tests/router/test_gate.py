from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from router.gate import router_logits, select_experts
from router.gate_config import GateConfig, ScoringFunc, TopkMethod

HIDDEN_SIZE = 16
V2 = GateConfig(
    n_routed_experts=32,
    num_experts_per_tok=6,
    n_group=8,
    topk_group=3,
    topk_method=TopkMethod.GROUP_LIMITED_GREEDY,
    routed_scaling_factor=16.0,
)
V2_LITE = GateConfig(n_routed_experts=16, num_experts_per_tok=6)
V3 = GateConfig(
    n_routed_experts=32,
    num_experts_per_tok=8,
    n_group=4,
    topk_group=2,
    topk_method=TopkMethod.NOAUX_TC,
    scoring_func=ScoringFunc.SIGMOID,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
)

V3_OF_ONE = replace(V3, num_experts_per_tok=1)


def published_router(config: GateConfig) -> DeepseekV2TopkRouter | DeepseekV3TopkRouter:
    shared = {
        "hidden_size": HIDDEN_SIZE,
        "num_attention_heads": 4,
        "n_routed_experts": config.n_routed_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "n_group": config.n_group,
        "topk_group": config.topk_group,
        "routed_scaling_factor": config.routed_scaling_factor,
    }
    if config.topk_method is TopkMethod.NOAUX_TC:
        return DeepseekV3TopkRouter(DeepseekV3Config(**shared, norm_topk_prob=config.norm_topk_prob))
    return DeepseekV2TopkRouter(DeepseekV2Config(**shared, topk_method=config.topk_method.value))


@settings(max_examples=60, deadline=None)
@given(
    config=st.sampled_from([V2, V2_LITE, V3, V3_OF_ONE]),
    seed=st.integers(0, 2**31),
    num_tokens=st.integers(1, 200),
    spread=st.floats(0.01, 4.0),
)
def test_agrees_with_the_routers_of_transformers(config: GateConfig, seed: int, num_tokens: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    router = published_router(config)
    router.weight.data = spread * torch.randn(config.n_routed_experts, HIDDEN_SIZE, generator=generator)
    bias = None
    if config.topk_method is TopkMethod.NOAUX_TC:
        bias = 0.2 * torch.randn(config.n_routed_experts, generator=generator)
        router.e_score_correction_bias.data = bias
    hidden_states = torch.randn(num_tokens, HIDDEN_SIZE, generator=generator)
    with torch.inference_mode():
        published_logits, published_weights, published_ids = router(hidden_states)
    logits = router_logits(hidden_states, router.weight.data)
    torch.testing.assert_close(logits, published_logits)
    weights, ids = select_experts(published_logits, config, bias)
    assert (ids.diff(dim=-1) > 0).all()
    theirs, ours = (torch.zeros(num_tokens, config.n_routed_experts) for _ in range(2))
    theirs.scatter_(1, published_ids, published_weights)
    ours.scatter_(1, ids, weights)
    is_clear = clear_choice(published_logits, config, bias)
    torch.testing.assert_close(ours[is_clear], theirs[is_clear], rtol=1e-5, atol=1e-7)


def clear_choice(logits: Tensor, config: GateConfig, bias: Tensor | None) -> Tensor:
    """Rows without equal scores; where scores tie, torch leaves open which of them it takes."""
    scores = logits.sigmoid() + bias if bias is not None else logits.softmax(dim=-1)
    ordered = scores.sort(dim=-1).values
    return (ordered.diff(dim=-1) > 0).all(dim=-1)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), config=st.sampled_from([V2, V3]))
def test_a_token_stays_in_its_groups_even_where_scores_underflow_or_tie(
    data: st.DataObject, config: GateConfig
) -> None:
    logit = st.sampled_from([-200.0, -100.0, 0.0, 0.0, 1.0, 200.0]) | st.floats(-200, 200, width=32)
    rows = st.lists(logit, min_size=config.n_routed_experts, max_size=config.n_routed_experts)
    logits = torch.tensor(data.draw(st.lists(rows, min_size=1, max_size=4)))
    bias = torch.full((config.n_routed_experts,), -5.0) if config is V3 else None
    weights, ids = select_experts(logits, config, bias)
    assert (ids.diff(dim=-1) > 0).all()
    assert weights.isfinite().all()
    assert (weights >= 0).all()
    for row in ids // config.experts_per_group:
        assert len(row.unique()) <= config.topk_group


def test_a_score_of_zero_outside_the_groups_is_not_chosen_over_one_inside() -> None:
    logits = torch.full((1, 32), -200.0)
    logits[0, 28:] = 200.0  # the last group takes all; every other score underflows to 0
    _, ids = select_experts(logits, V2)
    groups = set((ids[0] // V2.experts_per_group).tolist())
    assert len(groups) <= 3
    assert 7 in groups


def test_ties_go_to_the_lower_expert_and_the_lower_group() -> None:
    _, ids = select_experts(torch.zeros(3, 32), V2)
    assert ids.tolist() == [[0, 1, 2, 3, 4, 5]] * 3
    _, ids = select_experts(torch.zeros(1, 32), V3, torch.zeros(32))
    assert ids.tolist() == [list(range(8))]


def test_v2_ranks_groups_by_their_best_and_v3_by_the_sum_of_their_best_two() -> None:
    logits = torch.full((1, 8), -4.0)
    logits[0, 0], logits[0, 4:6] = 2.0, 1.5  # one strong expert in group 0, two good ones in group 1
    shape = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
    by_best = GateConfig(topk_method=TopkMethod.GROUP_LIMITED_GREEDY, **shape)
    by_two = GateConfig(topk_method=TopkMethod.NOAUX_TC, scoring_func=ScoringFunc.SIGMOID, **shape)
    assert select_experts(logits, by_best)[1].tolist() == [[0, 1]]
    assert select_experts(logits, by_two)[1].tolist() == [[4, 5]]


def test_the_bias_steers_the_selection_and_not_the_weights() -> None:
    logits, bias = torch.zeros(1, 32), torch.zeros(32)
    bias[24:32] = 1.0
    weights, ids = select_experts(logits, V3, bias)
    assert ids.tolist() == [list(range(24, 32))]
    torch.testing.assert_close(weights, torch.full((1, 8), 2.5 / 8))


def test_v2_does_not_normalise_and_scales() -> None:
    weights, ids = select_experts(torch.zeros(1, 32), V2)
    torch.testing.assert_close(weights, torch.full((1, 6), 16.0 / 32))
    assert len(set(ids[0].tolist())) == 6


def test_a_gate_that_cannot_choose_enough_is_refused() -> None:
    with pytest.raises(ValueError, match="does not divide"):
        GateConfig(n_routed_experts=10, num_experts_per_tok=2, n_group=3)
    with pytest.raises(ValueError, match="topk_group is 4"):
        GateConfig(n_routed_experts=12, num_experts_per_tok=2, n_group=3, topk_group=4)
    with pytest.raises(ValueError, match="hold 4"):
        GateConfig(
            n_routed_experts=12,
            num_experts_per_tok=6,
            n_group=3,
            topk_group=1,
            topk_method=TopkMethod.GROUP_LIMITED_GREEDY,
        )
