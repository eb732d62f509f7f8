from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from tests.attention.steps import random_token_ids, relative_error
from tests.checkpoints import write_checkpoint
from tests.reference import Reference


def published_logits(folder: Path, token_ids: list[int], dtype: torch.dtype) -> Tensor:
    """What transformers' own DeepSeek says: [num_tokens, vocab_size] fp32."""
    transformers.logging.set_verbosity_error()  # it lists the multi-token prediction tensors it does not use
    settings = {"dtype": dtype, "experts_implementation": "eager"}  # the faster one takes no odd sizes
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **settings).eval()
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0].float()


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("shape", ["v2", "v2_lite", "v3"])
def test_the_reference_agrees_with_transformers(tmp_path: Path, shape: str, num_shards: int) -> None:
    folder = write_checkpoint(tmp_path, shape, seed=num_shards, num_shards=num_shards)
    token_ids = random_token_ids(700, seed=1)  # beyond the context that YaRN stretches
    found = Reference(folder).logits(token_ids)
    assert relative_error(found, published_logits(folder, token_ids, torch.float32)) < 1e-4
    assert found.softmax(dim=-1).max(dim=-1).values.mean() > 0.05  # logits that tell tokens apart


@pytest.mark.parametrize("shape", ["v2", "v3"])
def test_the_softmax_scale_of_yarn_is_in_both(tmp_path: Path, shape: str) -> None:
    scaled = write_checkpoint(tmp_path / "scaled", shape)
    changes = {"rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 512}}
    unscaled = write_checkpoint(tmp_path / "unscaled", shape, **changes)
    token_ids = random_token_ids(100, seed=1)
    for folder in (scaled, unscaled):
        found = Reference(folder).logits(token_ids)
        assert relative_error(found, published_logits(folder, token_ids, torch.float32)) < 1e-4
    difference = Reference(scaled).logits(token_ids) - Reference(unscaled).logits(token_ids)
    assert difference.abs().max() > 0.1


def test_generating_step_by_step_is_taking_the_best_of_the_whole_again_and_again(tmp_path: Path) -> None:
    reference = Reference(write_checkpoint(tmp_path, "v2"))
    prompt = random_token_ids(30, seed=4)
    generated = reference.generate(prompt, 12)
    logits = reference.logits(prompt + generated[:-1])[len(prompt) - 1 :]
    assert logits.argmax(dim=-1).tolist() == generated


def test_a_prompt_of_5000_tokens_is_within_reach(tmp_path: Path) -> None:
    reference = Reference(write_checkpoint(tmp_path, "v2_lite"))
    assert len(reference.generate(random_token_ids(5000, seed=4), 3)) == 3
