import math

import pytest
import torch
import torch.nn.functional as F

from cluster.bundled_model.checkpoint import read_checkpoint, write_checkpoint
from cluster.bundled_model.muon import orthogonalise
from cluster.bundled_model.training_model import ModelConfig, MoE, TrainingModel, YarnConfig, yarn_inverse_frequencies

SMALL = ModelConfig(
    vocab_size=40,
    hidden_size=32,
    num_hidden_layers=2,
    intermediate_size=48,
    moe_intermediate_size=16,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_group=8,
    topk_group=3,
    num_attention_heads=2,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
)


@pytest.fixture
def model() -> TrainingModel:
    torch.manual_seed(0)
    return TrainingModel(SMALL)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes as in the published DeepSeek-V2 checkpoints."""
    hidden, heads, inner = config.hidden_size, config.num_attention_heads, config.moe_intermediate_size

    def mlp(prefix: str, size: int) -> dict[str, tuple[int, ...]]:
        down = {f"{prefix}.down_proj.weight": (hidden, size)}
        return {f"{prefix}.gate_proj.weight": (size, hidden), f"{prefix}.up_proj.weight": (size, hidden)} | down

    shapes = {"model.embed_tokens.weight": (config.vocab_size, hidden), "model.norm.weight": (hidden,)}
    shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for layer_id in range(config.num_hidden_layers):
        layer = f"model.layers.{layer_id}"
        attention = f"{layer}.self_attn"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{attention}.q_a_proj.weight": (config.q_lora_rank, hidden),
            f"{attention}.q_a_layernorm.weight": (config.q_lora_rank,),
            f"{attention}.q_b_proj.weight": (heads * config.qk_head_dim, config.q_lora_rank),
            f"{attention}.kv_a_proj_with_mqa.weight": (config.kv_lora_rank + config.qk_rope_head_dim, hidden),
            f"{attention}.kv_a_layernorm.weight": (config.kv_lora_rank,),
            f"{attention}.kv_b_proj.weight": (
                heads * (config.qk_nope_head_dim + config.v_head_dim),
                config.kv_lora_rank,
            ),
            f"{attention}.o_proj.weight": (hidden, heads * config.v_head_dim),
        }
        if layer_id < config.first_k_dense_replace:
            shapes |= mlp(f"{layer}.mlp", config.intermediate_size)
            continue
        shapes[f"{layer}.mlp.gate.weight"] = (config.n_routed_experts, hidden)
        shapes |= mlp(f"{layer}.mlp.shared_experts", inner * config.n_shared_experts)
        for expert_id in range(config.n_routed_experts):
            shapes |= mlp(f"{layer}.mlp.experts.{expert_id}", inner)
    return shapes


def test_exported_tensors_have_exactly_the_published_names_and_shapes(model: TrainingModel) -> None:
    exported = {name: tuple(weight.shape) for name, weight in model.published_state_dict().items()}
    assert exported == expected_shapes(SMALL)


def test_checkpoint_read_back_gives_the_logits_of_the_bfloat16_weights(model: TrainingModel, tmp_path) -> None:
    write_checkpoint(model, tmp_path)
    again = read_checkpoint(tmp_path)
    assert again.config == SMALL
    model.load_state_dict({name: weight.bfloat16().float() for name, weight in model.state_dict().items()})
    token_ids = torch.arange(12).view(1, 12)
    assert torch.equal(again(token_ids)[0], model(token_ids)[0])


def test_no_token_is_routed_to_more_than_three_groups(model: TrainingModel) -> None:
    _, routings = model(torch.randint(0, SMALL.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0)))
    groups = routings[0].topk_ids // (SMALL.n_routed_experts // SMALL.n_group)
    assert max(len(set(row)) for row in groups.flatten(0, 1).tolist()) == SMALL.topk_group


def test_moe_layer_equals_a_loop_over_tokens_and_their_experts(model: TrainingModel) -> None:
    moe = model.model.layers[1].mlp
    assert isinstance(moe, MoE)
    x = torch.randn(1, 9, SMALL.hidden_size, generator=torch.Generator().manual_seed(1))
    out, routing = moe(x)
    for token, score, ids, answer in zip(x[0], routing.scores[0], routing.topk_ids[0], out[0], strict=True):
        expected = moe.shared_experts(token)
        for expert_id in ids.tolist():
            gate, up = moe.experts_gate_up[expert_id]
            inner = F.silu(gate @ token) * (up @ token)
            expected = expected + SMALL.routed_scaling_factor * score[expert_id] * (moe.experts_down[expert_id] @ inner)
        torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-5)


def test_logits_do_not_depend_on_later_tokens(model: TrainingModel) -> None:
    token_ids = torch.arange(16).view(1, 16)
    changed = token_ids.clone()
    changed[0, 10:] = 3
    torch.testing.assert_close(model(token_ids)[0][:, :10], model(changed)[0][:, :10])


def test_every_parameter_gets_a_gradient(model: TrainingModel) -> None:
    logits, _ = model(torch.randint(0, SMALL.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0)))
    logits.logsumexp(dim=-1).mean().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.parameters())


def test_softmax_scale_has_the_square_of_the_published_mscale() -> None:
    published = ModelConfig(qk_nope_head_dim=128, qk_rope_head_dim=64, yarn=YarnConfig(factor=40.0))
    assert published.softmax_scale == pytest.approx(0.114721, abs=1e-6)


def test_yarn_keeps_the_fastest_frequency_and_divides_the_slowest_by_the_factor() -> None:
    config = ModelConfig()
    frequencies = yarn_inverse_frequencies(config)
    slowest = config.rope_theta ** (2 / config.qk_rope_head_dim - 1) / config.yarn.factor
    assert frequencies[0].item() == pytest.approx(1.0)
    assert frequencies[-1].item() == pytest.approx(slowest)
    assert (frequencies.diff() < 0).all()


@pytest.mark.parametrize("shape", [(3, 8, 32), (3, 32, 8)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    singular_values = torch.linalg.svdvals(orthogonalise(matrices))
    assert math.isclose(singular_values.mean(), 1.0, abs_tol=0.25)
    assert singular_values.max() < 1.3
    assert singular_values.min() > 0.5
