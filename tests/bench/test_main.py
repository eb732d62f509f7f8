import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console, RenderableType

from tests.bench import __main__ as bench
from tests.bench.row import WHY, Options, Row, Unmeasurable


def rendered(content: RenderableType) -> str:
    console = Console(width=200, file=io.StringIO())
    console.print(content)
    return console.file.getvalue()


def part_that(result: object) -> SimpleNamespace:
    """A module of the bench whose first row is good and whose second ends in `result`."""

    def rows(options: Options) -> Iterator[Row]:
        yield Row(name="good", value=1.0, unit="x")
        if isinstance(result, Exception):
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
    options, _ = bench.parse_options(["--only", "wire,decode", "--models", "tiny,bundled", "--cores", "1"])
    assert options.only == ("wire", "decode")
    assert options.models == ("tiny", "bundled")
    assert options.num_threads == 1


@pytest.mark.parametrize("arguments", [["--only", "warp"], ["--formats", "int3"], ["--cores", "100000"], ["--quack"]])
def test_what_is_not_understood_ends_with_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.parse_options(arguments)
    assert ended.value.code == 2
    assert "usage" in capsys.readouterr().err


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
