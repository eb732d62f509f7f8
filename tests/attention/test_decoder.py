import random
from pathlib import Path

import pytest
import torch

from attention.mla_form import MlaForm
from experts.kernels.library import native
from tests.attention.steps import StepRunner, random_token_ids, relative_error
from tests.checkpoints import write_checkpoint
from tests.reference import Reference
from tests.test_reference import published_logits

SHAPES = ("v2", "v2_lite", "v3")
needs_kernels = pytest.mark.skipif(
    native() is None, reason="the CPU kernels are not built; torch rounds rows otherwise beside others"
)


@pytest.fixture(scope="module", params=SHAPES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp(request.param), request.param, seed=1, num_shards=2)


@pytest.mark.parametrize("form", MlaForm)
def test_a_whole_prompt_and_then_single_tokens_give_the_logits_of_the_reference(folder: Path, form: MlaForm) -> None:
    runner = StepRunner(folder, form=form)
    sequence = runner.sequence(random_token_ids(90, seed=1), num_prompt_tokens=80)
    runner.step([(sequence, 80)])
    for _ in range(10):
        runner.step([(sequence, 1)])
    expected = Reference(folder).logits(sequence.token_ids)
    assert relative_error(torch.cat(sequence.logits), expected) < 1e-4


@pytest.mark.parametrize("form", MlaForm)
def test_sequences_in_random_chunks_side_by_side_give_the_logits_of_the_reference(folder: Path, form: MlaForm) -> None:
    runner, rng = StepRunner(folder, form=form), random.Random(7)
    sequences = [runner.sequence(random_token_ids(n, seed=n), n - n // 3) for n in (1, 16, 77, 300, 610)]
    while unfinished := [s for s in sequences if s.num_computed_tokens < len(s.token_ids)]:
        chosen = rng.sample(unfinished, rng.randint(1, len(unfinished)))
        left = [len(s.token_ids) - s.num_computed_tokens for s in chosen]
        runner.step([(s, min(n, rng.choice((1, 1, 5, 33, 64, 200)))) for s, n in zip(chosen, left, strict=True)])
    reference = Reference(folder)
    for sequence in sequences:
        assert relative_error(torch.cat(sequence.logits), reference.logits(sequence.token_ids)) < 1e-4


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("form", MlaForm)
def test_without_the_kernels_torch_gives_the_logits_of_the_reference(folder: Path, form: MlaForm) -> None:
    runner = StepRunner(folder, form=form)
    sequences = [runner.sequence(random_token_ids(n, seed=n), n - 10) for n in (30, 120)]
    runner.step([(sequence, len(sequence.token_ids) - 10) for sequence in sequences])
    for _ in range(10):
        runner.step([(sequence, 1) for sequence in sequences])
    for sequence in sequences:
        expected = Reference(folder).logits(sequence.token_ids)
        assert relative_error(torch.cat(sequence.logits), expected) < 1e-4


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_other_sequences_of_a_batch_change_no_bit_of_a_sequence(folder: Path, dtype: torch.dtype) -> None:
    def logits_of_first(num_others: int) -> torch.Tensor:
        runner = StepRunner(folder, dtype=dtype)
        first = runner.sequence(random_token_ids(60, seed=1), num_prompt_tokens=40)
        others = [runner.sequence(random_token_ids(40 + 90 * i, seed=2 + i)) for i in range(num_others)]
        runner.step([(other, len(other.token_ids) - 20) for other in others] + [(first, 40)])
        for _ in range(20):
            runner.step([(other, 1) for other in others] + [(first, 1)])
        return torch.cat(first.logits)

    alone = logits_of_first(0)
    assert torch.equal(logits_of_first(1), alone)
    assert torch.equal(logits_of_first(5), alone)


@needs_kernels
@pytest.mark.parametrize("form", MlaForm)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cutting_into_chunks_changes_no_bit(folder: Path, dtype: torch.dtype, form: MlaForm) -> None:
    def logits(chunks: list[int]) -> torch.Tensor:
        runner = StepRunner(folder, dtype=dtype, form=form)
        sequence = runner.sequence(random_token_ids(330, seed=5), num_prompt_tokens=250)
        for chunk in chunks:
            runner.step([(sequence, chunk)])
        return torch.cat(sequence.logits)

    whole = logits([330])
    assert torch.equal(logits([1, 2, 3, 64, 65, 129, 66]), whole)
    assert torch.equal(logits([30] * 11), whole)


@needs_kernels
@pytest.mark.parametrize("needs_every_choice", [False, True])
@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_rows_that_are_wanted_have_the_same_bits_when_the_last_layer_leaves_out_the_others(
    folder: Path, num_micro_batches: int, needs_every_choice: bool
) -> None:
    def logits(wanted: list[list[int] | None]) -> list[torch.Tensor]:
        runner = StepRunner(folder, num_micro_batches=num_micro_batches, needs_every_choice=needs_every_choice)
        prompt, other = (runner.sequence(random_token_ids(n, seed=n), n - 2) for n in (80, 40))
        steps = [[(prompt, 40), (other, 39)], [(prompt, 39), (other, 1)], [(prompt, 1)]]
        return [runner.step(rows, output_rows=output_rows) for rows, output_rows in zip(steps, wanted, strict=True)]

    whole = logits([None, None, None])
    some = logits([[3, 38, 78], [39], [0]])
    assert torch.equal(some[0], whole[0][[3, 38, 78]])
    assert torch.equal(some[1], whole[1][[39]])
    assert torch.equal(some[2], whole[2])  # reads the latents of rows that were left out


def test_the_last_layer_asks_experts_only_for_rows_whose_logits_are_wanted(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "v2", num_hidden_layers=4)
    for needs_every_choice, num_last in ((False, 2), (True, 70)):
        runner = StepRunner(folder, needs_every_choice=needs_every_choice)
        runner.step([(runner.sequence(random_token_ids(70, seed=1)), 70)], output_rows=[5, 69])
        assert runner.experts.num_rows == [(1, 70), (2, 70), (3, num_last)]


@pytest.mark.usefixtures("without_kernels")
def test_without_the_kernels_the_rows_that_are_wanted_have_the_logits_of_the_reference(folder: Path) -> None:
    runner = StepRunner(folder)
    prompt, generated = runner.sequence(random_token_ids(50, seed=1)), runner.sequence(random_token_ids(30, seed=2), 20)
    found = runner.step([(prompt, 50), (generated, 30)], output_rows=[7, 49, 60, 75, 79])
    expected = Reference(folder).logits(prompt.token_ids)[[7, 49]]
    assert relative_error(found[:2], expected) < 1e-4
    expected = Reference(folder).logits(generated.token_ids)[[10, 25, 29]]
    assert relative_error(found[2:], expected) < 1e-4


def check_a_chunk_of_which_nothing_is_wanted(folder: Path, *, needs_every_choice: bool = False) -> None:
    """The last layer ends with its latents, which the next chunk reads."""
    runner = StepRunner(folder, needs_every_choice=needs_every_choice)
    sequence = runner.sequence(random_token_ids(50, seed=1))
    assert runner.step([(sequence, 30)], output_rows=[]).shape == (0, runner.config.vocab_size)
    every = [(layer_id, 30) for layer_id in runner.config.moe_layer_ids]
    last = runner.config.num_hidden_layers - 1
    assert runner.experts.num_rows == [row for row in every if needs_every_choice or row[0] != last]
    logits = runner.step([(sequence, 20)], output_rows=[19])
    expected = Reference(folder).logits(sequence.token_ids)
    assert relative_error(logits[0], expected[-1]) < 1e-4


@pytest.mark.parametrize("needs_every_choice", [False, True])
@pytest.mark.parametrize("changes", [{"num_hidden_layers": 3}, {"first_k_dense_replace": 2, "num_hidden_layers": 2}])
def test_a_chunk_of_which_nothing_is_wanted_leaves_its_latents(
    tmp_path: Path, changes: dict[str, int], needs_every_choice: bool
) -> None:
    folder = write_checkpoint(tmp_path, "v2", **changes)
    check_a_chunk_of_which_nothing_is_wanted(folder, needs_every_choice=needs_every_choice)


@pytest.mark.usefixtures("without_kernels")
def test_without_the_kernels_a_chunk_of_which_nothing_is_wanted_leaves_its_latents(folder: Path) -> None:
    check_a_chunk_of_which_nothing_is_wanted(folder)


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_is_no_further_from_the_reference_than_that_of_transformers(tmp_path: Path, shape: str) -> None:
    # With as many experts as a token visits no rounding can make it choose others.
    folder = write_checkpoint(tmp_path, shape, n_routed_experts=6, n_group=1, topk_group=1)
    runner = StepRunner(folder, dtype=torch.bfloat16)
    sequence = runner.sequence(random_token_ids(200, seed=3))
    runner.step([(sequence, 150)])
    runner.step([(sequence, 49)])
    runner.step([(sequence, 1)])
    expected = Reference(folder).logits(sequence.token_ids)
    theirs = published_logits(folder, sequence.token_ids, torch.bfloat16)

    def mean_error(found: torch.Tensor) -> float:
        return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).mean())

    assert mean_error(torch.cat(sequence.logits)) < 1.1 * mean_error(theirs)


def test_tied_embeddings_and_no_shared_experts_and_every_second_layer_a_mixture(tmp_path: Path) -> None:
    changes = {"tie_word_embeddings": True, "n_shared_experts": None, "moe_layer_freq": 2, "num_hidden_layers": 5}
    folder = write_checkpoint(tmp_path, "v2", **changes)
    runner = StepRunner(folder)
    assert runner.config.moe_layer_ids == (2, 4)
    sequence = runner.sequence(random_token_ids(50, seed=1))
    runner.step([(sequence, 50)])
    assert relative_error(sequence.logits[0], Reference(folder).logits(sequence.token_ids)) < 1e-4


def test_plain_rotary_embedding_without_scaling(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "v2", rope_scaling=None)
    runner = StepRunner(folder)
    sequence = runner.sequence(random_token_ids(700, seed=1))
    runner.step([(sequence, 699)])
    runner.step([(sequence, 1)])
    assert relative_error(torch.cat(sequence.logits), Reference(folder).logits(sequence.token_ids)) < 1e-4


@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_who_asked_is_told_once_that_the_layers_begin_before_any_expert_is_asked(
    folder: Path, num_micro_batches: int
) -> None:
    runner = StepRunner(folder, num_micro_batches=num_micro_batches)
    sequence = runner.sequence(random_token_ids(20, seed=1))
    num_dispatched: list[int] = []
    runner.step([(sequence, 20)], on_begun=lambda: num_dispatched.append(len(runner.experts.num_rows)))
    assert num_dispatched == [0]
    assert runner.experts.num_rows
