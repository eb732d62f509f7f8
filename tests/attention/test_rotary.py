import math

import pytest
import torch
from transformers import DeepseekV2Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from attention.rotary import RotaryConfig, RotaryEmbedding, YarnConfig


def published_yarn(mscale: float) -> YarnConfig:
    return YarnConfig(factor=40, original_max_position_embeddings=4096, mscale=mscale, mscale_all_dim=mscale)


@pytest.mark.parametrize(("mscale", "factor", "scale"), [(0.707, 1.589626, 0.114721), (1.0, 1.873854, 0.135234)])
def test_yarn_sharpens_the_softmax_by_mscale_squared(mscale: float, factor: float, scale: float) -> None:
    config = RotaryConfig(head_dim=64, yarn=published_yarn(mscale))
    assert config.softmax_scale_factor == pytest.approx(factor, abs=1e-6)
    assert 192**-0.5 * config.softmax_scale_factor == pytest.approx(scale, abs=1e-6)
    assert config.magnitude == 1.0


def test_yarn_without_mscale_all_dim_scales_the_rotated_half_and_not_the_softmax() -> None:
    yarn = YarnConfig(factor=40, original_max_position_embeddings=4096)
    config = RotaryConfig(head_dim=64, yarn=yarn)
    assert config.softmax_scale_factor == 1.0
    assert config.magnitude == pytest.approx(0.1 * math.log(40) + 1.0)


@pytest.mark.parametrize(("head_dim", "original", "factor"), [(64, 4096, 40.0), (8, 512, 40.0), (32, 128, 4.0)])
def test_yarn_frequencies_are_those_of_transformers(head_dim: int, original: int, factor: float) -> None:
    yarn = YarnConfig(factor=factor, original_max_position_embeddings=original, mscale=0.707, mscale_all_dim=0.707)
    published = DeepseekV2Config(
        qk_rope_head_dim=head_dim,
        max_position_embeddings=int(original * factor),
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": factor,
            "original_max_position_embeddings": original,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
    )
    expected, magnitude = ROPE_INIT_FUNCTIONS["yarn"](published)
    found = RotaryConfig(head_dim=head_dim, yarn=yarn)
    torch.testing.assert_close(found.inverse_frequencies(), expected, rtol=1e-6, atol=0)
    assert found.magnitude == pytest.approx(magnitude)


def test_neighbours_are_a_complex_number_turned_by_position_times_frequency() -> None:
    config = RotaryConfig(head_dim=6)
    positions = torch.tensor([0, 1, 7, 5000])
    x = torch.randn(4, 3, 6)
    turned = RotaryEmbedding(config).at(positions).apply(x)
    angles = positions.double()[:, None, None] * torch.tensor([10000 ** (-2 * i / 6) for i in range(3)]).double()
    expected = torch.view_as_complex(x.double().unflatten(-1, (3, 2))) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(turned, torch.view_as_real(expected).flatten(-2).float(), rtol=1e-3, atol=1e-3)
    assert torch.equal(turned[0], x[0])


def test_scores_depend_on_the_distance_alone() -> None:
    rotary = RotaryEmbedding(RotaryConfig(head_dim=64, yarn=published_yarn(0.707)))
    query, key = torch.randn(1, 64), torch.randn(1, 64)

    def score(query_position: int, key_position: int) -> float:
        turned_query = rotary.at(torch.tensor([query_position])).apply(query)
        return float((turned_query * rotary.at(torch.tensor([key_position])).apply(key)).sum())

    assert score(3, 1) == pytest.approx(score(903, 901), abs=1e-3)


def test_keeps_the_dtype_and_turns_in_fp32() -> None:
    rotary = RotaryEmbedding(RotaryConfig(head_dim=8))
    x = torch.randn(5, 8).bfloat16()
    turned = rotary.at(torch.arange(5)).apply(x)
    assert turned.dtype is torch.bfloat16
    assert torch.equal(turned, rotary.at(torch.arange(5)).apply(x.float()).bfloat16())


def test_impossible_embeddings_are_refused() -> None:
    with pytest.raises(ValueError, match="qk_rope_head_dim is 7"):
        RotaryConfig(head_dim=7)
    with pytest.raises(ValueError, match="rope_theta is 1"):
        RotaryConfig(head_dim=8, theta=1.0)
    with pytest.raises(ValueError, match=r"factor is 0\.5, must be 1 to 1e\+06"):
        YarnConfig(factor=0.5, original_max_position_embeddings=4096)
    with pytest.raises(ValueError, match="original_max_position_embeddings is 0"):
        YarnConfig(factor=40, original_max_position_embeddings=0)
    with pytest.raises(ValueError, match="beta_fast 1 must"):
        YarnConfig(factor=40, original_max_position_embeddings=4096, beta_fast=1, beta_slow=32)
