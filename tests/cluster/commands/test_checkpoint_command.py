"""`mobula checkpoint` as a user calls it."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cluster.checkpoint.convert import Conversion
from cluster.commands.cli import app
from tests.checkpoints import write_checkpoint


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["checkpoint", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", "v2", seed=3)


def test_a_conversion_is_written_compared_and_shown(source: Path, tmp_path: Path) -> None:
    result = run("convert", source, tmp_path / "made", "--experts", "int4", "--max-tokens", 64)
    assert result.exit_code == 0, result.output
    for word in ("wrote", "perplexity", "same greedy token", "logit error, median"):
        assert word in result.output
    weights = json.loads((tmp_path / "made" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert weights["group_0"]["weights"]["group_size"] == 32


def test_two_checkpoints_are_compared_on_a_text_of_ones_own(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("The manta and the mobula glide over the reef.")
    result = run("compare", source, source, "--text", text)
    assert result.exit_code == 0, result.output
    assert "100.00%" in result.output


def test_what_cannot_be_done_is_said_without_a_traceback(source: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    assert run("convert", source, made, "--experts", "int8", "--no-compare").exit_code == 0
    for arguments, message in (
        (("convert", source, made, "--experts", "int8"), "exists; name another folder or give --force"),
        (("convert", source, source, "--experts", "int8", "--force"), "is the source itself"),
        (("convert", made, tmp_path / "again", "--experts", "int4"), "is quantised already"),
        (("convert", tmp_path / "nothing", tmp_path / "x", "--experts", "int4"), "no such folder"),
        (("convert", source, tmp_path / "x", "--experts", "int4", "--group-size", 7), "must be multiples"),
        (("compare", source, tmp_path / "nothing"), "no such folder"),
    ):
        result = run(*arguments)
        assert result.exit_code == 1
        assert result.output.startswith("error:")
        assert message in result.output.replace("\n", " ")
        assert "Traceback" not in result.output
    assert run("convert", source, made, "--experts", "int4", "--no-compare", "--force").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "source"]


def test_what_comparing_needs_is_looked_at_before_anything_is_converted(source: Path, tmp_path: Path) -> None:
    latin, empty, made = tmp_path / "latin", tmp_path / "empty", tmp_path / "made"
    latin.write_bytes("Bücher".encode("latin-1"))
    empty.touch()
    for text, message in (
        (latin, f"{latin} is not UTF-8: invalid start byte at byte 1"),
        (empty, "the text has 0 tokens, at least 2 are needed; give a longer one; give --no-compare to convert"),
    ):
        result = run("convert", source, made, "--experts", "int8", "--text", text)
        assert result.exit_code == 1
        assert message in result.output
    (source / "tokenizer.json").unlink()
    result = run("convert", source, made, "--experts", "int8")
    assert result.exit_code == 1
    assert "has no file tokenizer.json; give --no-compare to convert without" in result.output
    assert not made.exists()
    assert run("convert", source, made, "--experts", "int8", "--no-compare").exit_code == 0


def test_a_broken_tokenizer_is_told_without_a_traceback(source: Path) -> None:
    (source / "tokenizer.json").write_text("{}")
    result = run("compare", source, source)
    assert result.exit_code == 1
    assert result.output.startswith("error: the checkpoints are not compared")


def test_a_comparison_of_what_may_be_two_models_warns(source: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", "v3", num_hidden_layers=2)
    result = run("compare", source, other, "--max-tokens", 8)
    assert result.exit_code == 0
    assert "warning: are they of one model? model_type of" in result.output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_ends_a_conversion_leaves_nothing_behind_and_shows_in_the_status(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    def interrupt(self: Conversion, folder: Path, on_written: object) -> None:
        (folder / "model.safetensors").write_text("half")
        signal.raise_signal(number)

    def unexpected(number: int, frame: object) -> None:
        raise AssertionError

    monkeypatch.setattr(Conversion, "write", interrupt)
    handler = signal.default_int_handler if number is signal.SIGINT else unexpected
    before = signal.signal(number, handler)  # whatever these tests were started with
    try:
        result = run("convert", source, tmp_path / "made", "--experts", "int4")
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
    assert result.exit_code == 128 + number
    assert "interrupted" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_ends_a_conversion_when_the_checkpoint_is_made_does_not_say_that_nothing_changed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, rmtree = tmp_path / "made", shutil.rmtree
    assert run("convert", source, made, "--experts", "int8", "--no-compare").exit_code == 0

    def interrupted(path: Path, *, ignore_errors: bool) -> None:
        monkeypatch.setattr(shutil, "rmtree", rmtree)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    result = run("convert", source, made, "--experts", "int4", "--no-compare", "--force")
    assert result.exit_code == 128 + signal.SIGTERM
    assert result.output.endswith(f"error: interrupted; {made} is the new checkpoint\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "source"]


def test_the_command_line_loads_torch_only_for_a_command_that_needs_it() -> None:
    code = "import sys, cluster.commands.cli; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
