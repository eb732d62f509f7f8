"""`mobula trace` as a user calls it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cluster.commands.cli import app
from cluster.roles.single_process import SingleProcess
from router.placement import POLICIES
from router.trace.trace import TraceHeader, TraceWindow
from router.trace.trace_file import TraceFile, TraceWriter
from tests.checkpoints import write_checkpoint
from tests.router.trace.traces import random_ids, tiny_model

KEYS = {
    *("policy", "shards", "redundancy", "balancedness_total", "balancedness_layer_p01", "ranks_per_token_mean"),
    *("ranks_per_token_max", "bytes_per_token", "moved_bytes", "step_time"),
}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["trace", *map(str, arguments)], env={"COLUMNS": "80"})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "tiny", "v2", seed=3)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "reef.txt"
    path.write_text("The manta and the mobula glide over the reef, and the reef is quiet. " * 20)
    return path


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path, model = tmp_path / "tiny.npz", tiny_model()
    with TraceWriter(path, TraceHeader(model=model, source="by hand")) as writer:
        for number in range(4):
            writer.add(TraceWindow(topk_ids=random_ids(model, 100, seed=number)))
    return path


def test_what_is_recorded_can_be_replayed(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "trace.npz"
    result = run("record", "--out", out, "--model", checkpoint, "--text", text, "--tokens", 300)
    assert result.exit_code == 0, result.output
    assert "wrote 300 tokens (reef.txt 300)" in result.stdout
    recorded = TraceFile(out)
    assert recorded.num_tokens == 300
    assert recorded.header.started_at is not None
    assert {window.label for window in recorded.windows()} == {"reef.txt"}
    result = run("replay", out, "--shards", 3, "--policy", "static")
    assert result.exit_code == 0, result.output
    assert "placed by the first 150 tokens, scored on the 150 after them" in result.stdout


def test_prompts_are_continued_in_turn_with_the_same_experts_for_the_same_seed(
    checkpoint: Path, tmp_path: Path
) -> None:
    files = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        out = tmp_path / f"{name}.npz"
        arguments = ("--prompt", "The manta", "--prompt", "A reef", "--tokens", 300, "--seed", seed)
        result = run("record", "--out", out, "--model", checkpoint, *arguments)
        assert result.exit_code == 0, result.output
        files.append([window.topk_ids.tolist() for window in TraceFile(out).windows()])
        labels = [window.label for window in TraceFile(out).windows()]
        assert labels == ["prompt 1", "prompt 2"] * (len(labels) // 2) + ["prompt 1"] * (len(labels) % 2)
        assert TraceFile(out).num_tokens == 300
    assert files[0] == files[1] != files[2]


def test_seconds_end_a_recording(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "trace.npz"
    result = run("record", "--out", out, "--model", checkpoint, "--prompt", "The manta", "--seconds", 0.001)
    assert result.exit_code == 0, result.output
    assert 1 <= TraceFile(out).num_tokens < 300


def test_control_c_keeps_what_was_recorded(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, calls = SingleProcess.logits, []

    def interrupted(self: SingleProcess, token_ids: list[int]) -> object:
        calls.append(token_ids)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return compute(self, token_ids)

    monkeypatch.setattr(SingleProcess, "logits", interrupted)
    out = tmp_path / "trace.npz"
    result = run("record", "--out", out, "--model", checkpoint, "--text", text)
    assert result.exit_code == 0, result.output
    assert "interrupted after" in result.stdout
    assert TraceFile(out).num_tokens == len(calls[0])


def test_what_cannot_be_recorded_is_said_and_leaves_no_file(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    out, there = tmp_path / "trace.npz", tmp_path / "there.npz"
    there.write_text("precious")
    empty = tmp_path / "empty.txt"
    empty.touch()
    short = tmp_path / "short.txt"
    short.write_text("a")
    for arguments, message in (
        (("--out", there, "--model", checkpoint), "exists; name another file or give --force"),
        (("--out", out, "--model", checkpoint, "--seconds", 0), "--seconds is 0.0, must be more than 0"),
        (("--out", out, "--prompt", "x", "--text", text), "not both"),
        (("--out", out, "--model", tmp_path / "nothing"), "no such folder"),
        (("--out", out, "--model", checkpoint, "--prompt", "reef " * 9000), "must be 1 to"),
        (
            ("--out", tmp_path / "no" / "x.npz", "--model", checkpoint, "--text", text),
            f"cannot write {tmp_path}/no/x.npz: No such file or directory",
        ),
        (("--out", out, "--model", checkpoint, "--text", empty), "0 of the 2 tokens that a replay needs"),
        (("--out", out, "--model", checkpoint, "--text", short), "1 of the 2 tokens that a replay needs"),
    ):
        result = run("record", *arguments)
        assert result.exit_code == 1, result.output
        assert message in result.stderr
        assert "Traceback" not in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "reef.txt", "short.txt", "there.npz"]
    assert there.read_text() == "precious"


def test_json_has_one_object_for_each_placement_and_nothing_else(trace: Path) -> None:
    result = run("replay", trace, "--shards", 2, "--shards", 3, "--redundancy", 0, "--policy", "static", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [(row["policy"], row["shards"], row["redundancy"]) for row in rows] == [("static", 2, 0), ("static", 3, 0)]
    for row in rows:
        assert set(row) == KEYS
        assert row["moved_bytes"] == 0


def test_all_policies_are_replayed_unless_one_is_named() -> None:
    arguments = ("replay", "--synthetic", "zipf:1.1", "--model", "v2", "--tokens", 64, "--json")
    everything = json.loads(run(*arguments).stdout)
    assert {row["policy"] for row in everything} <= set(POLICIES)
    assert "static" in {row["policy"] for row in everything}
    assert run(*arguments, "--policy", "all").stdout == run(*arguments).stdout
    assert [row["policy"] for row in json.loads(run(*arguments, "--policy", "static").stdout)] == ["static"]


def test_a_rebalance_from_the_static_placement_is_told_apart() -> None:
    arguments = ("replay", "--synthetic", "zipf", "--tokens", 64, "--policy", "device_limited")
    assert "--from-static places with fewer moves" in run(*arguments).stdout
    assert "as few as pay" in run(*arguments, "--from-static").stdout


@pytest.mark.parametrize("synthetic", ["zipf:1.1", "drift", "bursts", "correlated"])
@pytest.mark.parametrize("model", ["v2", "v2-lite", "v3"])
def test_drawn_traffic_of_every_published_model_is_replayed_alike_for_a_seed(synthetic: str, model: str) -> None:
    arguments = ("replay", "--synthetic", synthetic, "--model", model, "--tokens", 32, "--policy", "static", "--json")
    assert run(*arguments, "--seed", 5).stdout == run(*arguments, "--seed", 5).stdout != run(*arguments).stdout


def test_the_model_may_be_a_config_file(checkpoint: Path) -> None:
    for path in (checkpoint, checkpoint / "config.json"):
        result = run("replay", "--synthetic", "zipf", "--model", path, "--tokens", 32, "--shards", 2)
        assert result.exit_code == 0, result.output
        assert "tiny: " in result.stdout


def test_what_a_trace_says_of_itself_does_nothing_to_the_terminal(trace: Path, tmp_path: Path) -> None:
    recorded = TraceFile(trace)
    hostile = tmp_path / "hostile.npz"
    header = replace(recorded.header, source="\x1b[31mred[bold]x")
    with TraceWriter(hostile, header) as writer:
        for window in recorded.windows():
            writer.add(window)
    result = run("replay", hostile, "--policy", "static")
    assert result.exit_code == 0, result.output
    assert "\x1b[31m" not in result.stdout
    assert "red[bold]x" in result.stdout


def test_the_table_is_whole_in_a_narrow_terminal() -> None:
    result = run("replay", "--synthetic", "zipf", "--model", "v3", "--tokens", 32, "--shards", 16)
    assert "…" not in result.stdout
    assert "16 +0%" in result.stdout
    for policy in POLICIES:
        assert policy in result.stdout


def test_what_cannot_be_replayed_is_said_with_the_way_out(trace: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.npz"
    broken.write_bytes(trace.read_bytes()[:-30])
    for arguments, message in (
        ((), "give either a recorded FILE or --synthetic"),
        ((trace, "--synthetic", "zipf"), "give either a recorded FILE or --synthetic"),
        ((trace, "--seed", 1), "--seed is 1, but the trace has its own"),
        ((trace, "--model", "v3"), "--model is v3, but the trace has its own"),
        ((broken,), "truncated or no trace: record it again"),
        ((tmp_path / "nothing.npz",), "No such file"),
        ((trace, "--policy", "best"), "policy is 'best', known are static"),
        ((trace, "--shards", 5000), "shards is 5000, must be 1 to 4096"),
        ((trace, "--redundancy", -1), "redundancy is -1.0, must be 0 to 7"),
        ((trace, "--step-tokens", 0), "step_tokens is 0, must be 1 to 65536"),
        ((trace, "--tflops", 0), "flops_per_s is 0.0"),
        (("--synthetic", "pareto"), "skew is 'pareto', known are zipf, drift, bursts, correlated"),
        (("--synthetic", "zipf", "--tokens", 2**25), "num_tokens is 33554432, must be 1 to"),
        (("--synthetic", "zipf", "--model", "v4"), "model is 'v4', known are v2, v2-lite, v3 and paths"),
        (("--synthetic", "zipf", "--model", tmp_path), "config.json"),
        ((trace, "--policy", "static", *(word for n in range(1100) for word in ("--shards", n + 1))), "limit is 1024"),
    ):
        result = run("replay", *arguments)
        assert result.exit_code == 1, (arguments, result.output)
        assert result.stderr.startswith("error:"), result.output
        assert message in result.stderr
        assert "Traceback" not in result.output
        assert result.stdout == ""


def test_a_policy_without_a_placement_is_told_beside_those_that_have_one(trace: Path) -> None:
    arguments = ("replay", trace, "--policy", "static", "--replicas", 3, "--json", "--shards", 2)
    assert run(*arguments).exit_code == 1, "not one was placed"
    result = run(*arguments, "--shards", 4)
    assert result.exit_code == 0
    assert [row["shards"] for row in json.loads(result.stdout)] == [4]
    assert "no placement by static for 2 +0%: num_replicas is 3" in result.stderr


def test_a_picture_without_matplotlib_says_how_to_install_it(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("replay", trace, "--plot", tmp_path / "plot.png")
    assert result.exit_code == 1
    assert "pip install 'mobula-serve[train]', or leave --plot out" in result.stderr
    assert not (tmp_path / "plot.png").exists()


def test_a_picture_is_drawn_where_matplotlib_is_installed(trace: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", exc_type=ImportError)
    result = run("replay", trace, "--shards", 2, "--shards", 3, "--plot", tmp_path / "plot.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_replay_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from cluster.commands.cli import app;"
        "result = CliRunner().invoke(app, 'trace replay --synthetic zipf --tokens 8'.split());"
        "sys.exit(result.exit_code or 'torch' in sys.modules or 'ray' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
