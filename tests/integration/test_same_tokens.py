"""The system gives the reference's greedy tokens, whatever the number of workers, shards and other requests."""

import random
from functools import cache
from pathlib import Path

import pytest

from cluster import bundled_model
from tests.checkpoints import write_checkpoint
from tests.reference import Reference
from tests.system import System

NUM_TOKENS = 64
LONG_PROMPT = 5000
LENGTHS = (1, 17, 300, LONG_PROMPT, 2, 3, 5, 9, 33, 64, 65, 100, 129, 200, 260, 400)
SHAPES = ("v2", "v2_lite", "v3", "bundled")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("checkpoints")
    folders = {shape: write_checkpoint(base / shape, shape, seed=7) for shape in SHAPES if shape != "bundled"}
    return folders | {"bundled": bundled_model.path()}


@cache
def expected(folder: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Random prompts and the reference's continuations."""
    reference = Reference(folder)
    rng = random.Random(3)
    vocab_size = reference.config.decoder.vocab_size
    prompts = [[rng.randrange(3, vocab_size) for _ in range(length)] for length in LENGTHS]
    return prompts, [reference.generate(prompt, NUM_TOKENS) for prompt in prompts]


@pytest.mark.parametrize(
    ("shape", "num_workers", "num_shards"),
    [
        *((shape, 1, num_shards) for shape in ("v2", "bundled") for num_shards in (1, 2, 5)),
        *((shape, 3, 3) for shape in SHAPES),
        *((shape, 1, 12) for shape in SHAPES),
    ],
)
def test_sixteen_prompts_at_once_give_the_reference_tokens(
    folders: dict[str, Path], shape: str, num_workers: int, num_shards: int
) -> None:
    prompts, continuations = expected(folders[shape])
    with System(folders[shape], num_workers=num_workers, num_shards=num_shards, dtype="float32") as system:
        assert system.greedy_at_once(prompts, NUM_TOKENS) == continuations
        assert system.becomes_idle()


@pytest.mark.parametrize(("shape", "num_shards"), [("v2", 1), ("v2", 12), ("v2_lite", 2), ("v3", 3), ("bundled", 5)])
def test_a_prompt_alone_gives_the_reference_tokens(folders: dict[str, Path], shape: str, num_shards: int) -> None:
    prompts, continuations = expected(folders[shape])
    with System(folders[shape], num_shards=num_shards, dtype="float32") as system:
        for prompt, continuation in list(zip(prompts, continuations, strict=True))[:4]:
            assert system.greedy(prompt, NUM_TOKENS) == continuation


@pytest.mark.usefixtures("without_kernels")
def test_a_system_installed_without_a_compiler_gives_the_reference_tokens(folders: dict[str, Path]) -> None:
    prompts, continuations = expected(folders["v2"])
    with System(folders["v2"], num_shards=2, dtype="float32") as system:
        for prompt, continuation in list(zip(prompts, continuations, strict=True))[:2]:
            assert system.greedy(prompt, NUM_TOKENS) == continuation
