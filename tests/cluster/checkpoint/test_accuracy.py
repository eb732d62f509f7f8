"""One process's logits, and what two checkpoints' comparison says of them."""

import errno
import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

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
    with pytest.raises(CannotCompare, match="the text has 0 tokens, at least 2 are needed"):
        compare(first, first, text="")
    with pytest.raises(CannotCompare, match="the text has 1 token, at least 2 are needed"):
        compare(first, first, text="T")


def test_what_may_be_of_two_models_is_doubted(tmp_path: Path) -> None:
    first, second = (
        write_checkpoint(tmp_path / "first"),
        write_checkpoint(tmp_path / "second", "v3", num_hidden_layers=2),
    )
    text = "The manta and the mobula glide over the reef."
    assert compare(str(first), str(first), text=text).doubts == ()
    tokenizer = second / "tokenizer_config.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"add_bos_token": True}))
    of_type, of_tokens = compare(str(first), str(second), text=text).doubts
    assert of_type == f"model_type of {first} is deepseek_v2, of {second} deepseek_v3"
    assert of_tokens == f"the tokenizers of {first} and {second} read the text as different tokens"


@pytest.mark.parametrize("is_reference", [True, False])
def test_logits_that_are_not_finite_are_no_agreement(tmp_path: Path, is_reference: bool) -> None:
    whole, broken = str(write_checkpoint(tmp_path / "whole")), write_checkpoint(tmp_path / "broken")
    path = broken / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"][7] = torch.nan
    save_file(tensors, path)
    role, pair = ("reference", (str(broken), whole)) if is_reference else ("candidate", (whole, str(broken)))
    with pytest.raises(CannotCompare, match=f"the {role}, {broken}, gives logits that are NaN or infinite"):
        compare(*pair, text="The manta and the mobula glide over the reef.")


def test_a_temporary_folder_that_is_too_small_is_named_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    stages: list[str] = []
    folder = str(write_checkpoint(tmp_path / "model"))
    with pytest.raises(CannotCompare, match=r"temporary has no room .* 5,120 bytes .* set TMPDIR .* --max-tokens"):
        compare(folder, folder, text="x = 1\n", max_tokens=4, on_progress=lambda stage, _: stages.append(stage))
    assert stages == []
    assert list((tmp_path / "temporary").iterdir()) == []


def test_the_standard_text_is_long_enough_and_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert held_out_text(20_000) == held_out_text(20_000)
    assert len(held_out_text(20_000)) >= 20_000
    monkeypatch.setattr(accuracy.sysconfig, "get_path", lambda name: "/nowhere")
    assert held_out_text(20_000) == accuracy.FALLBACK_TEXT
