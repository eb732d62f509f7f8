import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console, RenderableType

from tests.bench import __main__ as bench
from tests.bench.row import WHY, Options, Row, Unmeasurable, load


def rendered(content: RenderableType) -> str:
    console = Console(width=200, file=io.StringIO())
    console.print(content)
    return console.file.getvalue()


def part_that(result: object) -> SimpleNamespace:
    """A module of the bench whose first row is good and whose second ends in `result`."""

    def rows(options: Options) -> Iterator[Row]:
        yield Row(name="good", value=1.0, unit="x")
        if isinstance(result, BaseException):
            raise result

    return SimpleNamespace(rows=rows)


@pytest.fixture
def options() -> Options:
    return Options(only=(), models=(), folder=Path(), num_threads=1)


def test_every_part_and_the_default_models_run_when_nothing_is_named() -> None:
    options, out = bench.parse_options([])
    assert options.only == bench.PARTS
    assert options.models == ("lite4", "tiny")
    assert options.has_peers
    assert out is None
    assert 24 * 60 < options.seconds_left() <= 25 * 60


def test_quick_run_is_short_and_needs_no_large_checkpoint() -> None:
    options, _ = bench.parse_options(["--quick", "--no-peers", "--out", "bench.json"])
    assert options.models == ("tiny",)
    assert options.is_quick
    assert not options.has_peers
    assert options.seconds_left() <= 5 * 60


def test_parts_and_models_are_named_with_commas() -> None:
    options, _ = bench.parse_options(["--only", " wire, decode", "--models", "tiny,bundled", "--cores", "1"])
    assert options.only == ("wire", "decode")
    assert options.models == ("tiny", "bundled")
    assert options.num_threads == 1


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--only", "warp"], ["--formats", "int3"], ["--cores", "100000"], ["--quack"], ["--models", "lite5"]),
        *(["--max-minutes", minutes] for minutes in ("nan", "-1", "0")),
    ],
)
def test_what_is_not_understood_ends_with_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.parse_options(arguments)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "usage" in told
    assert arguments[-1] in told


def test_a_folder_with_a_config_is_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    options, _ = bench.parse_options(["--models", str(tmp_path)])
    assert options.models == (str(tmp_path),)


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for out, why in (
        (tmp_path, "Is a directory"),
        (tmp_path / "nowhere" / "x", "No such file or directory"),
        (tmp_path / "file" / "x", "Not a directory"),
    ):
        with pytest.raises(SystemExit):
            bench.parse_options(["--out", str(out)])
        assert f"--out {out} cannot be written: {why}" in capsys.readouterr().err
    bench.parse_options(["--out", str(tmp_path / "new")])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def console() -> Console:
    return Console(width=200, file=io.StringIO())


def test_ctrl_c_prints_the_rows_so_far_and_shows_in_the_status(
    options: Options, console: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.importlib, "import_module", lambda name: part_that(KeyboardInterrupt()))
    assert bench.run(replace(options, only=("decode", "wire")), tmp_path / "rows", console) == 130
    text = console.file.getvalue()
    assert "good" in text
    assert "interrupted" in text
    assert [row.name for row in load(tmp_path / "rows")] == ["good"]


def test_rows_that_cannot_be_written_are_printed_all_the_same(
    options: Options, console: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.importlib, "import_module", lambda name: part_that(None))
    assert bench.run(replace(options, only=("decode",)), tmp_path / "gone" / "rows", console) == 1
    text = console.file.getvalue()
    assert "good" in text
    assert "not every row is in" in text
    assert "No such file or directory" in text


def test_cache_part_says_that_it_is_not_built_yet(options: Options) -> None:
    (row,) = bench.measure("cache", options)
    assert row.is_missing
    assert "not built yet" in str(row.params[WHY])


@pytest.mark.parametrize("error", [Unmeasurable("no compiler"), KeyError("a bug")])
def test_part_that_fails_keeps_its_rows_and_says_why(
    error: Exception, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.importlib, "import_module", lambda name: part_that(error))
    good, missing = bench.measure("decode", options)
    assert good.value == 1.0
    assert missing.is_missing
    assert str(error.args[0]) in str(missing.params[WHY])
