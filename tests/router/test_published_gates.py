"""Every gate against transformers, where it has it, and against a loop over tokens, ties and underflow included."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import MixtralConfig, NllbMoeConfig, SwitchTransformersConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

from router import capacity
from router.gate import asks_second_choice, expert_scores, select_experts
from router.gate_config import GateConfig, ScoringFunc, TopkMethod
from tests.router import naive_gates
from tests.router.test_gate import V2, V2_LITE, V3

NUM_EXPERTS = 16
MIXTRAL = GateConfig(n_routed_experts=NUM_EXPERTS, num_experts_per_tok=2, topk_method=TopkMethod.MIXTRAL)
GSHARD = GateConfig(n_routed_experts=NUM_EXPERTS, num_experts_per_tok=2, topk_method=TopkMethod.GSHARD_TOP2)
SWITCH = GateConfig(n_routed_experts=NUM_EXPERTS, num_experts_per_tok=1, topk_method=TopkMethod.SWITCH_TOP1)
ALL = {"v2": V2, "v2_lite": V2_LITE, "v3": V3, "mixtral": MIXTRAL, "gshard": GSHARD, "switch": SWITCH}
KINDS = ("random", "ties", "underflow", "mixed")


def some_logits(kind: str, num_tokens: int, num_experts: int, seed: int, lowest: float = -math.inf) -> Tensor:
    """Eighths, so that unequal logits have unequal scores unless these underflow or saturate."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(num_tokens, num_experts, generator=generator) * 16).round() / 8
    picks = torch.randint(0, 6, logits.shape, generator=generator)
    if kind == "ties":
        logits = (picks % 3).float()
    if kind == "underflow":
        logits = torch.tensor([-300.0, -150.0, -104.0, -90.0, 0.0, 200.0])[picks]
    if kind == "mixed":
        logits = torch.where(picks == 0, lowest, torch.where(picks == 1, 3.0, logits))
    # At least one is a number.
    return logits.scatter(1, picks[:, :1], logits.clamp(min=-300.0).gather(1, picks[:, :1]))


def dense(topk_ids: Tensor, topk_weights: Tensor, num_experts: int) -> Tensor:
    return torch.zeros(len(topk_ids), num_experts).scatter(1, topk_ids, topk_weights)


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
@settings(max_examples=120)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 2**31), num_tokens=st.integers(0, 40))
def test_every_gate_is_what_a_loop_over_tokens_says(config: GateConfig, kind: str, seed: int, num_tokens: int) -> None:
    logits = some_logits(kind, num_tokens, config.n_routed_experts, seed)
    bias = None
    if config is V3:
        bias = torch.randint(-3, 4, (config.n_routed_experts,), generator=torch.Generator().manual_seed(seed)) / 4
    weights, ids = select_experts(logits, config, bias)
    assert weights.dtype is torch.float32
    assert (ids.diff(dim=-1) > 0).all()
    scores = expert_scores(logits, config.scoring_func)
    for token in range(num_tokens):
        expected = naive_gates.choose(scores[token], logits[token], config, bias)
        assert ids[token].tolist() == sorted(expected)
        assert weights[token].tolist() == pytest.approx([expected[i] for i in sorted(expected)], rel=1e-5, abs=1e-37)


@settings(max_examples=200)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 2**31), num_tokens=st.integers(1, 40))
def test_mixtral_is_that_of_transformers(kind: str, seed: int, num_tokens: int) -> None:
    router = MixtralTopKRouter(MixtralConfig(hidden_size=NUM_EXPERTS, num_local_experts=NUM_EXPERTS))
    router.weight.data = torch.eye(NUM_EXPERTS)
    logits = some_logits(kind, num_tokens, NUM_EXPERTS, seed, lowest=-1e30)  # times 0 in their product
    with torch.inference_mode():
        _, their_weights, their_ids = router(logits)
    weights, ids = select_experts(logits, MIXTRAL)
    # Which of equal experts is taken they leave open; the weights are the same.
    torch.testing.assert_close(weights.sort(dim=-1).values, their_weights.sort(dim=-1).values, rtol=1e-5, atol=1e-37)
    scores = logits.softmax(dim=-1).sort(dim=-1, descending=True).values
    is_clear = scores[:, 1] > scores[:, 2]
    assert torch.equal(ids[is_clear], their_ids.sort(dim=-1).values[is_clear])


@settings(max_examples=200)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 2**31), num_tokens=st.integers(1, 60), limit=st.integers(1, 30))
def test_switch_with_its_capacity_is_that_of_transformers(kind: str, seed: int, num_tokens: int, limit: int) -> None:
    router = SwitchTransformersTop1Router(
        SwitchTransformersConfig(hidden_size=NUM_EXPERTS, num_experts=NUM_EXPERTS, expert_capacity=limit)
    )
    router.classifier.weight.data = torch.eye(NUM_EXPERTS)
    logits = some_logits(kind, num_tokens, NUM_EXPERTS, seed, lowest=-1e30)
    with torch.inference_mode():
        mask, probabilities, _ = router(logits.unsqueeze(0))
    weights, ids = select_experts(logits, SWITCH)
    kept = capacity.switch(ids, capacity=limit)
    torch.testing.assert_close(dense(ids, weights * kept, NUM_EXPERTS), mask[0] * probabilities[0], rtol=1e-6, atol=0)


@settings(max_examples=200)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 2**31), num_tokens=st.integers(1, 60), limit=st.integers(1, 30))
def test_gshard_with_its_capacity_is_that_of_nllb(kind: str, seed: int, num_tokens: int, limit: int) -> None:
    router = NllbMoeTop2Router(
        NllbMoeConfig(
            d_model=NUM_EXPERTS, num_experts=NUM_EXPERTS, expert_capacity=limit, moe_eval_capacity_token_fraction=-1.0,
            second_expert_policy="all", normalize_router_prob_before_dropping=True, batch_prioritized_routing=False,
        )
    )  # fmt: skip
    logits = some_logits(kind, num_tokens, NUM_EXPERTS, seed, lowest=-1e30)
    first_kept, expected = router.route_tokens(logits.clone())
    weights, ids = select_experts(logits, GSHARD)
    kept = capacity.gshard(ids, logits.softmax(dim=-1).gather(-1, ids), capacity=limit)
    found = dense(ids, weights * kept, NUM_EXPERTS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-37)
    assert torch.equal(dense(ids, kept.float(), NUM_EXPERTS)[first_kept.bool()], torch.ones(int(first_kept.sum())))


@settings(max_examples=200)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 2**31), num_tokens=st.integers(0, 60), limit=st.integers(1, 30))
def test_gshard_with_a_random_second_choice_is_algorithm_1(kind: str, seed: int, num_tokens: int, limit: int) -> None:
    logits = some_logits(kind, num_tokens, NUM_EXPERTS, seed)
    uniforms = torch.rand(num_tokens, generator=torch.Generator().manual_seed(seed))
    weights, ids = select_experts(logits, GSHARD)
    asked = asks_second_choice(weights, uniforms)
    kept = capacity.gshard(ids, logits.softmax(dim=-1).gather(-1, ids), capacity=limit, asked=asked)
    expected = naive_gates.gshard(logits, limit, uniforms.tolist())
    for token in range(num_tokens):
        assert ids[token][kept[token]].tolist() == sorted(expected[token])
        expected_weights = [expected[token][i] for i in sorted(expected[token])]
        assert weights[token][kept[token]].tolist() == pytest.approx(expected_weights, rel=1e-5, abs=1e-37)


def test_the_second_choice_is_asked_as_often_as_twice_its_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    for second in (0.0, 0.1, 0.25, 0.4, 0.5):
        weights = torch.tensor([[1 - second, second]]).expand(40_000, 2)
        uniforms = torch.rand(40_000, generator=generator)
        asked = asks_second_choice(weights, uniforms)
        assert asked[:, 0].all()
        assert float(asked[:, 1].float().mean()) == pytest.approx(2 * second, abs=0.01)
        assert torch.equal(asks_second_choice(weights, uniforms), asked)
    assert asks_second_choice(torch.full((1, 2), 0.5), torch.tensor([0.999999])).all()
    assert asks_second_choice(torch.tensor([[0.2, 0.8]]), torch.tensor([0.5])).tolist() == [[False, True]]


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
def test_a_row_without_numbers_is_its_own_misfortune(config: GateConfig) -> None:
    logits = some_logits("random", 5, config.n_routed_experts, seed=3)
    expected_weights, expected_ids = select_experts(logits, config)
    for broken in (-math.inf, math.nan):
        damaged = logits.clone()
        damaged[2] = broken
        weights, ids = select_experts(damaged, config)
        others = [0, 1, 3, 4]
        assert torch.equal(weights[others], expected_weights[others])
        assert torch.equal(ids[others], expected_ids[others])
        assert 0 <= int(ids[2].min()) <= int(ids[2].max()) < config.n_routed_experts
        assert (ids[2].diff() > 0).all()
        if config.scoring_func is ScoringFunc.SOFTMAX:
            assert weights[2].isnan().all()  # the sampler reports it for this request alone


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 1, "topk_method": TopkMethod.GSHARD_TOP2}, "1, gshard_top2 has 2"),
        ({"num_experts_per_tok": 2, "topk_method": TopkMethod.SWITCH_TOP1}, "2, switch_top1 has 1"),
        ({"topk_method": TopkMethod.MIXTRAL, "n_group": 2}, "n_group is 2, mixtral has 1; leave it out"),
        ({"topk_method": TopkMethod.MIXTRAL, "norm_topk_prob": True}, "norm_topk_prob is True"),
        ({"topk_method": TopkMethod.MIXTRAL, "scoring_func": ScoringFunc.SIGMOID}, "scoring_func is sigmoid"),
    ],
)
def test_what_a_published_gate_leaves_no_choice_about_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GateConfig(**{"n_routed_experts": 8, "num_experts_per_tok": 2, **changes})
