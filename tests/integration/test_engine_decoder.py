"""Engine, runner and the real decoder, with the experts in this process: the reference's tokens, however they run."""

from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry

from attention.engine import Engine
from attention.engine_config import EngineConfig
from attention.metrics import EngineMetrics
from attention.mla_form import MlaForm
from attention.model_runner import ModelRunner
from tests.attention.fake_decoder import Listener, make_sequence, run_to_end
from tests.attention.steps import BLOCK_SIZE, StepRunner, random_token_ids
from tests.checkpoints import write_checkpoint
from tests.reference import Reference

NUM_NEW_TOKENS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("v2"), "v2", seed=1, num_shards=1)


def generate(folder, prompts, *, num_blocks, budget=64, dtype=torch.float32, **params):
    """Tokens of each prompt, and how often a sequence was preempted."""
    steps = StepRunner(folder, num_blocks=num_blocks, dtype=dtype, form=MlaForm.ABSORBED)
    config = EngineConfig(block_size=BLOCK_SIZE, max_num_seqs=8, max_num_batched_tokens=budget)
    runner = ModelRunner(steps.decoder, block_size=BLOCK_SIZE)
    engine = Engine(config, runner, num_blocks=num_blocks, metrics=EngineMetrics(CollectorRegistry(), dp_rank=0))
    listeners = [Listener() for _ in prompts]
    for i, (prompt, listener) in enumerate(zip(prompts, listeners, strict=True)):
        engine.submit(make_sequence(prompt, max_tokens=NUM_NEW_TOKENS, **{"seed": i, **params}), listener)
    run_to_end(engine)
    return [listener.token_ids for listener in listeners], engine.stats.num_preemptions


def test_greedy_tokens_are_those_of_the_reference_with_chunks_and_preemptions(folder: Path) -> None:
    prompts = [random_token_ids(n, seed=n) for n in (1, 17, 40, 90)]
    reference = Reference(folder)
    tokens, num_preemptions = generate(folder, prompts, num_blocks=12, budget=32)
    assert num_preemptions > 0
    assert tokens == [reference.generate(prompt, NUM_NEW_TOKENS) for prompt in prompts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampled_tokens_are_the_same_alone_together_cut_and_preempted(folder: Path, dtype: torch.dtype) -> None:
    prompts = [random_token_ids(n, seed=n) for n in (3, 33, 64, 70)]
    params = {"temperature": 1.0, "top_p": 0.9, "dtype": dtype}
    alone = [generate(folder, [prompt], num_blocks=64, seed=5, **params)[0][0] for prompt in prompts]
    together, num_preemptions = generate(folder, prompts, num_blocks=64, seed=5, **params)
    crowded, num_crowded_preemptions = generate(folder, prompts, num_blocks=10, budget=17, seed=5, **params)
    assert num_preemptions == 0 < num_crowded_preemptions
    assert together == alone
    assert crowded == alone
