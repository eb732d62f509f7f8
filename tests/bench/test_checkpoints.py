import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors import safe_open

from cluster.checkpoint.checkpoint import Checkpoint
from tests.bench import checkpoints
from tests.bench.row import Unmeasurable

SMALL = checkpoints.SHAPES["tiny"] | {"vocab_size": 300, "num_hidden_layers": 2, "hidden_size": 64}


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO())


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(checkpoints.SHAPES, "small", SMALL)
    monkeypatch.setattr(checkpoints, "TOKENIZER_CHARACTERS", 10_000)


@pytest.mark.usefixtures("small")
def test_checkpoint_is_one_that_we_serve_and_is_made_once(tmp_path: Path, console: Console) -> None:
    folder = checkpoints.find(tmp_path, "small", checkpoints.PLAIN, console)
    decoder = Checkpoint.open(folder).model_config().decoder
    Checkpoint.open(folder).check_role(decoder.weight_shapes())
    Checkpoint.open(folder).check_role(decoder.expert_weight_shapes(1, 15))
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert checkpoints.find(tmp_path, "small", checkpoints.PLAIN, console) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


@pytest.mark.usefixtures("small")
def test_same_shape_gives_the_same_bytes(tmp_path: Path, console: Console) -> None:
    first, second = (checkpoints.make(tmp_path / name, "small", console) for name in ("a", "b"))
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert (first / "tokenizer.json").read_bytes() == (second / "tokenizer.json").read_bytes()


@pytest.mark.usefixtures("small")
def test_tensors_are_scaled_sanely_and_tokens_are_as_many_as_the_model_has(tmp_path: Path, console: Console) -> None:
    folder = checkpoints.make(tmp_path, "small", console)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        up = file.get_tensor("model.layers.1.mlp.experts.3.up_proj.weight")
        norm = file.get_tensor("model.norm.weight")
    assert up.dtype == torch.bfloat16
    assert float(up.float().std()) == pytest.approx(64**-0.5, rel=0.05)
    assert float(norm.float().mean()) == pytest.approx(1.0, abs=0.05)
    tokens = json.loads((folder / "tokenizer.json").read_text())
    assert len(set(tokens["model"]["vocab"]) | {token["content"] for token in tokens["added_tokens"]}) == 300


@pytest.mark.usefixtures("small")
def test_interrupted_making_is_not_taken_for_a_checkpoint(tmp_path: Path, console: Console) -> None:
    (tmp_path / "small.unfinished").mkdir()
    (tmp_path / "small.unfinished" / "config.json").write_text("{}")
    assert checkpoints.find(tmp_path, "small", checkpoints.PLAIN, console) == tmp_path / "small"
    assert not (tmp_path / "small.unfinished").exists()


def test_full_disk_is_said_before_anything_is_written(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "SPARE_BYTES", 2**62)
    with pytest.raises(Unmeasurable, match=r"GB free, .* MOBULA_BENCH_DIR"):
        checkpoints.make(tmp_path / "full", "tiny", console)
    assert list((tmp_path / "full").iterdir()) == []


def test_unknown_name_lists_what_there_is(tmp_path: Path, console: Console) -> None:
    with pytest.raises(Unmeasurable, match=r"no checkpoint huge: .*lite4"):
        checkpoints.find(tmp_path, "huge", checkpoints.PLAIN, console)


def test_published_sizes_are_those_of_the_shapes() -> None:
    sizes = {
        name: sum(spec.num_bytes for spec in checkpoints.tensor_specs(checkpoints.COMMON | shape)) / 1e9
        for name, shape in checkpoints.SHAPES.items()
    }
    assert sizes["lite4"] == pytest.approx(3.81, abs=0.01)
    assert sizes["v2slice"] == pytest.approx(9.0, abs=0.2)
