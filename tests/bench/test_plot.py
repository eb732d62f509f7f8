from pathlib import Path

import pytest

from tests.bench.plot import charted, draw
from tests.bench.row import Row

ROWS = [
    Row(name="decode", params={"batch": 8}, value=100.0, unit="tokens/s", limit_fraction=0.9, ratios={"vLLM": 1.2}),
    Row(name="prefill", value=900.0, unit="tokens/s", limit_fraction=0.7, ratios={"vLLM": 1.1, "llama.cpp": 9.0}),
    Row(name="startup", value=9.0, unit="s"),
    Row.missing("wire", {}, "no reason"),
]


def test_only_rows_with_a_limit_or_a_peer_are_drawn() -> None:
    assert [row.name for row in charted(ROWS)] == ["decode", "prefill"]


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_picture_is_written(ending: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")  # comes with the train extra
    draw(ROWS, tmp_path / f"bench.{ending}")
    assert (tmp_path / f"bench.{ending}").stat().st_size > 1000
