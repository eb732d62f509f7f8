"""Drawn traffic has the skew that was asked for, obeys the gate, and is the same for the same seed."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from router.gate import select_experts
from router.gate_config import DEEPSEEK_METHODS, GateConfig, ScoringFunc, TopkMethod
from router.trace import synthetic
from router.trace.model_shape import PUBLISHED, ModelShape
from router.trace.synthetic import Skew, SkewKind, SyntheticTrace, choose_experts
from router.trace.trace import ExpertIds, TraceError, check_window
from router.trace.traffic import count_traffic
from tests.router.trace.traces import tiny_model

WIDE = tiny_model(experts=32, top_k=2, layers=2, is_limited=False)


def draw(model: ModelShape, skew: str, num_tokens: int = 4096, seed: int = 0) -> SyntheticTrace:
    return SyntheticTrace(model, Skew.parse(skew), num_tokens=num_tokens, seed=seed)


def all_ids(trace: SyntheticTrace) -> ExpertIds:
    return np.concatenate([window.topk_ids for window in trace.windows()], axis=1)


def shares(topk_ids: ExpertIds, num_experts: int) -> npt.NDArray[np.float64]:
    """Of each layer's assignments: [num_moe_layers, num_experts]."""
    counts = np.stack([np.bincount(ids.ravel(), minlength=num_experts) for ids in topk_ids])
    return counts / counts.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("skew", ["zipf:1.1", "drift", "bursts", "correlated"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_token_obeys_its_models_gate(name: str, skew: str) -> None:
    model = PUBLISHED[name]
    trace = draw(model, skew, num_tokens=70)
    windows = list(trace.windows())
    assert sum(window.num_tokens for window in windows) == trace.num_tokens == 70
    for window in windows:
        check_window(window, model)
        groups = window.topk_ids.astype(np.int64) // model.gate.experts_per_group
        num_groups = 1 + (np.diff(np.sort(groups, axis=-1), axis=-1) > 0).sum(axis=-1)
        assert num_groups.max() <= model.gate.max_groups_per_token


@given(
    seed=st.integers(0, 10**6),
    method=st.sampled_from(sorted(DEEPSEEK_METHODS)),
    groups=st.sampled_from([(1, 1), (4, 2), (8, 3), (4, 4), (16, 8)]),
)
def test_experts_are_chosen_as_the_gate_chooses_them(seed: int, method: TopkMethod, groups: tuple[int, int]) -> None:
    n_group, topk_group = groups
    scoring = ScoringFunc.SIGMOID if method is TopkMethod.NOAUX_TC else ScoringFunc.SOFTMAX
    gate = GateConfig(
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=n_group,
        topk_group=topk_group,
        topk_method=method,
        scoring_func=scoring,
    )
    keys = np.random.default_rng(seed).standard_exponential((5, 16), dtype=np.float32)
    _, expected = select_experts(torch.from_numpy(-np.log(keys)), gate)
    np.testing.assert_array_equal(choose_experts(keys, gate), expected.numpy())


@pytest.mark.parametrize("skew", list(SkewKind))
def test_a_seed_gives_the_same_tokens_again_and_another_seed_others(skew: str) -> None:
    model = tiny_model()
    first, again, other = (all_ids(draw(model, skew, num_tokens=600, seed=seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_zipf_popularity_is_zipf_with_another_order_in_each_layer() -> None:
    popularity = draw(WIDE, "zipf:1.5").popularity(0)
    expected = np.arange(1, 33) ** -1.5
    for layer in popularity:
        np.testing.assert_allclose(np.sort(layer)[::-1], expected / expected.sum(), rtol=1e-5)
    assert popularity[0].argmax() != popularity[1].argmax()


def test_one_expert_a_token_is_drawn_in_proportion_to_its_popularity() -> None:
    model = tiny_model(experts=16, top_k=1, layers=1, is_limited=False)
    trace = draw(model, "zipf:1.1", num_tokens=40_000)
    np.testing.assert_allclose(shares(all_ids(trace), 16), trace.popularity(0), atol=0.01)


def test_a_higher_exponent_is_a_higher_skew_and_zero_is_none() -> None:
    hottest = [shares(all_ids(draw(WIDE, f"zipf:{s}")), 32).max() for s in ("0", "0.6", "1.2")]
    assert hottest == sorted(hottest)
    assert hottest[0] < 1.3 / 32
    assert hottest[2] > 4 / 32


def test_drift_moves_from_one_order_of_experts_to_another_and_zipf_stays() -> None:
    def apart(skew: str) -> float:
        windows = list(draw(WIDE, skew).windows())
        first, last = (shares(windows[number].topk_ids, 32) for number in (0, -1))
        return float(np.abs(first - last).sum(axis=1).mean() / 2)  # total variation distance

    assert apart("zipf:1.1") < 0.15
    assert apart("drift:1.1") > 0.3


def test_bursts_make_a_few_experts_hot_for_some_windows() -> None:
    trace = draw(WIDE, "bursts:0.5", num_tokens=20 * synthetic.WINDOW_TOKENS)
    quiet = draw(WIDE, "zipf:0.5").popularity(0).max()
    hottest = np.array([trace.popularity(window).max() for window in range(20)])
    is_burst = hottest > 1.5 * quiet
    assert is_burst.sum() == np.ceil(10 * synthetic.BURST_SHARE) * synthetic.BURST_WINDOWS
    np.testing.assert_array_equal(is_burst[::2], is_burst[1::2])


def test_correlated_traffic_fires_hidden_sets_together_and_is_even_otherwise() -> None:
    trace = draw(WIDE, "correlated", num_tokens=8192)
    traffic = count_traffic(trace, trace.num_tokens)
    assert traffic.load.max() / traffic.load.mean() < 1.2
    for together in traffic.coactivation:
        partners = np.argsort(-together, axis=1)[:, : synthetic.SET_SIZE - 1]
        for expert, row in enumerate(together):
            inside = row[partners[expert]].sum() / row.sum()
            assert inside > 0.6, "two of three partners are of the expert's own set of 8 out of 32"
        sets = {frozenset([expert, *partners[expert].tolist()]) for expert in range(32)}
        assert len(sets) == 32 // synthetic.SET_SIZE, "partners of partners are partners"


@pytest.mark.parametrize(
    ("text", "kind", "strength"),
    [("zipf", "zipf", 1.1), ("zipf:0", "zipf", 0.0), ("drift:2", "drift", 2.0), ("correlated", "correlated", 100.0)],
)
def test_a_skew_is_a_name_and_a_number(text: str, kind: str, strength: float) -> None:
    assert Skew.parse(text) == Skew(kind=SkewKind(kind), strength=strength)


@pytest.mark.parametrize("text", ["", "pareto", "zipf:", "zipf:-1", "zipf:nan", "zipf:11", "correlated:0.5", "drift:x"])
def test_a_skew_that_is_none_is_refused_with_what_there_is(text: str) -> None:
    with pytest.raises(TraceError, match=r"known are zipf, drift, bursts, correlated|its number must be"):
        Skew.parse(text)


@pytest.mark.parametrize(("num_tokens", "seed"), [(0, 0), (2**25, 0), (8, -1), (8, 2**63)])
def test_sizes_and_seeds_have_limits(num_tokens: int, seed: int) -> None:
    with pytest.raises(TraceError, match="must be"):
        SyntheticTrace(WIDE, Skew.parse("zipf"), num_tokens=num_tokens, seed=seed)
