import json
import math
from pathlib import Path

import pytest

from tests.bench.row import WHY, Options, Row, Unmeasurable, better, dump, load, spread
from tests.bench.table import format_number, label_of, table_of
from tests.bench.test_main import rendered


def row(**changes: object) -> Row:
    fields = {"name": "decode", "params": {"model": "tiny", "batch": 8}, "value": 12.5, "unit": "tokens/s"}
    return Row(**(fields | changes))


def test_value_is_the_median_and_spread_half_of_the_middle_eighty_per_cent() -> None:
    result = Row.of("a", {}, [10.0, 20.0, 30.0], "tokens/s")
    assert result.value == 20.0
    assert result.spread == pytest.approx((28.0 - 12.0) / 2 / 20.0)
    assert spread([7.0]) == 0.0


def test_fraction_of_the_limit_is_taken_repeat_by_repeat() -> None:
    assert Row.of("a", {}, [10.0, 40.0, 90.0], "tokens/s", limits=[20.0, 80.0, 90.0]).limit_fraction == 0.5


@pytest.mark.parametrize(("unit", "expected"), [("tokens/s", 0.5), ("ms", 2.0), ("MB", 2.0), ("x", 0.5)])
def test_a_ratio_above_one_is_good_whatever_the_unit(unit: str, expected: float) -> None:
    assert better(10.0, 20.0, unit) == expected


def test_ratio_to_a_peer_is_the_median_over_turns_and_not_of_different_minutes() -> None:
    result = Row.of("a", {}, [10.0, 100.0], "tokens/s", turns={"peer": [(10.0, 5.0), (100.0, 50.0)], "late": []})
    assert result.ratios == {"peer": 2.0}


def test_rows_come_back_from_json_as_they_were(tmp_path: Path) -> None:
    rows = [row(spread=0.1, limit_fraction=0.9, ratios={"llama.cpp": 1.2}), Row.missing("cache", {}, "not built yet")]
    dump(rows, tmp_path / "bench.json")
    first, second = load(tmp_path / "bench.json")
    assert first == rows[0]
    assert second.is_missing
    assert second.params == {WHY: "not built yet"}


def test_json_has_the_agreed_fields_and_null_for_what_is_missing(tmp_path: Path) -> None:
    dump([Row.missing("a", {}, "why not")], tmp_path / "bench.json")
    (fields,) = json.loads((tmp_path / "bench.json").read_text())
    assert set(fields) == {"name", "params", "value", "unit", "spread", "limit_fraction", "ratios"}
    assert fields["value"] is None


def test_table_shows_each_row_and_why_one_is_missing() -> None:
    text = rendered(table_of([row(ratios={"vLLM": 1.25}, limit_fraction=0.87), Row.missing("wire", {}, "no [socket]")]))
    for expected in ("decode", "tiny batch 8", "12.5 tokens/s", "87%", "1.25", "x vLLM", "wire", "no [socket]"):
        assert expected in text


def test_label_leaves_out_probes_and_reasons() -> None:
    assert label_of(row(params={"model": "tiny", "against": "1 shard", "read GB/s": 40.0, WHY: "x"})) == (
        "tiny against 1 shard"
    )


@pytest.mark.parametrize(("value", "text"), [(1234.5, "1,234"), (123.45, "123.5"), (1.2345, "1.23"), (-0.5, "-0.5")])
def test_numbers_have_three_digits_or_more(value: float, text: str) -> None:
    assert format_number(value) == text


def test_measurement_that_would_end_too_late_is_refused_with_the_way_out() -> None:
    options = Options(only=(), models=(), folder=Path(), num_threads=1, deadline_s=-math.inf)
    with pytest.raises(Unmeasurable, match="--max-minutes"):
        options.check_time(1.0)
