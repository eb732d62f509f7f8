"""Models of sizes that nobody published, as pruned and distilled ones have them, against transformers."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.attention.steps import StepRunner, random_token_ids, relative_error
from tests.checkpoints import SHAPES, write_checkpoint
from tests.test_reference import published_logits


def drawn(seed: int) -> tuple[str, dict[str, Any]]:
    """A key of SHAPES and what is changed in it."""
    draw = random.Random(seed)
    shape = draw.choice(sorted(SHAPES))
    is_v3, heads = shape == "v3", draw.choice([1, 2, 3, 5, 7])
    num_experts = draw.choice([2, 6, 10, 32, 60])
    groups = [size for size in range(1, num_experts + 1) if num_experts % size == 0 and num_experts // size >= 2]
    method = "noaux_tc" if is_v3 else draw.choice(["greedy", "group_limited_greedy"])
    n_group = draw.choice(groups)
    topk_group = draw.randint(1, n_group)
    reach = num_experts if method == "greedy" else topk_group * num_experts // n_group
    num_layers = draw.randint(1, 3)
    return shape, {
        "vocab_size": draw.choice([320, 517]),
        "hidden_size": heads * draw.choice([8, 14, 20, 25]),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": draw.choice([None, 24, 10, 9]),
        "kv_lora_rank": draw.choice([20, 36, 64, 33 if is_v3 else 2]),
        "qk_nope_head_dim": draw.choice([2, 6, 10, 32]),
        "qk_rope_head_dim": draw.choice([2, 4, 10, 16]),
        "v_head_dim": draw.choice([1, 6, 16, 33]),
        "intermediate_size": draw.choice([17, 96, 101]),
        "moe_intermediate_size": draw.choice([1, 17, 33, 48]),
        "n_routed_experts": num_experts,
        "n_shared_experts": draw.choice([1, 2, 3]),
        "num_experts_per_tok": draw.randint(1, min(8, reach)),
        "n_group": n_group,
        "topk_group": topk_group,
        "topk_method": method,
        "norm_topk_prob": is_v3 and draw.random() < 0.5,  # of V2 transformers forgets to
        "routed_scaling_factor": draw.choice([1.0, 0.37, 16.0]),
        "num_hidden_layers": num_layers,
        "first_k_dense_replace": draw.randint(0, num_layers),
        "tie_word_embeddings": draw.random() < 0.3,
        "rms_norm_eps": draw.choice([1e-6, 1e-2]),
        "rope_theta": draw.choice([10000.0, 1e6]),
    }


@pytest.mark.parametrize("seed", range(32))
def test_a_model_of_any_sizes_has_the_logits_that_transformers_computes(tmp_path: Path, seed: int) -> None:
    shape, changes = drawn(seed)
    folder = write_checkpoint(tmp_path, shape, seed=seed, **changes)
    runner = StepRunner(folder)
    sequence = runner.sequence(random_token_ids(70, seed=seed))
    for num_tokens in (33, 36, 1):
        runner.step([(sequence, num_tokens)])
    found = [row for logits in sequence.logits for row in logits]
    expected = published_logits(folder, sequence.token_ids, torch.float32)
    assert max(relative_error(row, theirs) for row, theirs in zip(found, expected, strict=True)) < 2e-4
