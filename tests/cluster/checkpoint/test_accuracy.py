"""One process's logits, and what two checkpoints' comparison says of them."""

import json
from pathlib import Path

import pytest
import torch

from cluster.checkpoint import accuracy
from cluster.checkpoint.accuracy import CannotCompare, compare, held_out_text
from cluster.checkpoint.checkpoint import Checkpoint
from cluster.checkpoint.convert import plan
from cluster.config import parse_config
from cluster.roles.single_process import SequenceTooLong, SingleProcess
from tests.attention.steps import StepRunner, random_token_ids, relative_error
from tests.checkpoints import write_checkpoint


def converted(source: Path, folder: Path, num_bits: int) -> str:
    folder.mkdir()
    plan(Checkpoint.open(source), num_bits).write(folder, lambda _: None)
    return str(folder)


@pytest.mark.parametrize("shape", ["v2", "v3"])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_one_process_gives_the_decoders_logits_however_a_text_is_cut(
    tmp_path: Path, shape: str, num_shards: int
) -> None:
    folder = write_checkpoint(tmp_path, shape, seed=2)
    token_ids = random_token_ids(50, seed=1)
    runner = StepRunner(folder)
    rows = runner.sequence(token_ids)
    runner.step([(rows, len(token_ids))])
    engine = {"max_num_seqs": 1, "max_num_batched_tokens": 16, "cache_gib": 0.01}
    settings = {"attention_workers": {"engine": engine}, "expert_shards": {"count": num_shards}}
    with SingleProcess(parse_config({"model": str(folder)} | settings)) as process:
        found = process.logits(token_ids)
        assert relative_error(process.logits(token_ids[:20]), found[:20]) < 1e-5, "nothing is left of a text before"
    assert found.shape == (50, 320)
    assert found.dtype is torch.float32
    assert relative_error(found, rows.logits[0]) < 1e-5


def test_a_text_that_does_not_fit_is_refused_with_the_limit(tmp_path: Path) -> None:
    engine = {"max_num_seqs": 1, "max_model_len": 32}
    config = parse_config({"model": str(write_checkpoint(tmp_path)), "attention_workers": {"engine": engine}})
    with SingleProcess(config) as process, pytest.raises(SequenceTooLong, match="has 33 tokens, limit is 32"):
        process.logits([3] * 33)


def test_a_checkpoint_agrees_with_itself_and_int8_more_than_int4(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", "v2", seed=3)
    text = "The manta and the mobula glide over the reef. " * 20
    stages: list[tuple[str, float]] = []
    same = compare(str(source), str(source), text=text, on_progress=lambda *stage: stages.append(stage))
    assert same.greedy_agreement == 1.0
    assert same.median_logit_error == same.max_logit_error == 0.0
    assert same.reference_perplexity == same.candidate_perplexity > 1.0
    assert stages[-1] == ("running the candidate", 1.0)
    int8 = compare(str(source), converted(source, tmp_path / "int8", 8), text=text)
    int4 = compare(str(source), converted(source, tmp_path / "int4", 4), text=text)
    assert 0.0 < int8.median_logit_error < 0.05 < int4.median_logit_error < 0.5
    assert int8.greedy_agreement > int4.greedy_agreement
    assert int8.reference_perplexity == same.reference_perplexity


def test_a_checkpoint_of_float16_is_compared_in_float32(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", seed=3)
    config_path = source / "config.json"
    config_path.write_text(json.dumps(json.loads(config_path.read_text()) | {"torch_dtype": "float16"}))
    int8 = compare(str(source), converted(source, tmp_path / "int8", 8), text="The manta glides over the reef. " * 9)
    assert 0.0 < int8.median_logit_error < 0.05


def test_a_position_is_compared_with_its_own_largest_logit() -> None:
    measurement = accuracy._Measurement()
    reference = torch.tensor([[2.0, -4.0, 0.0], [1.0, 0.0, 0.0]])
    candidate = torch.tensor([[2.0, -4.0, 1.0], [0.5, 0.75, 0.0]])
    measurement.add(reference, candidate, torch.tensor([2, 0]))
    result = measurement.result()
    assert result.greedy_agreement == 0.5
    assert (result.median_logit_error, result.max_logit_error) == (0.25, 0.75)
    expected = -torch.log_softmax(reference, dim=-1)[0, 0]
    assert result.reference_perplexity == pytest.approx(float(expected.exp()))


def test_models_with_other_tokens_and_texts_without_tokens_are_refused(tmp_path: Path) -> None:
    first = str(write_checkpoint(tmp_path / "first"))
    second = str(write_checkpoint(tmp_path / "second", vocab_size=328))
    with pytest.raises(CannotCompare, match=r"has 320 tokens, .* has 328: they are not of one model"):
        compare(first, second)
    with pytest.raises(CannotCompare, match="at least 2 are needed"):
        compare(first, first, text="")


def test_the_standard_text_is_long_enough_and_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert held_out_text(20_000) == held_out_text(20_000)
    assert len(held_out_text(20_000)) >= 20_000
    monkeypatch.setattr(accuracy.sysconfig, "get_path", lambda name: "/nowhere")
    assert held_out_text(20_000) == accuracy.FALLBACK_TEXT
