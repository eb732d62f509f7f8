"""What an operator's terminal shows, read as text."""

from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console, RenderableType

from cluster.commands.admin_views import format_seconds, plan_view, rebalance_line, status_view
from cluster.controller.admin_messages import rebalance_message
from cluster.controller.process import DOWN
from cluster.controller.rebalance import RebalanceState, RebalanceStatus
from tests.fake_controller import rebalance_plan, serving_status


def text_of(view: RenderableType, width: int = 100) -> str:
    console = Console(file=StringIO(), width=width)
    console.print(view)
    return console.file.getvalue()  # type: ignore[attr-defined]


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("│┃").split("│")] for line in text.splitlines() if "│" in line]


def test_a_status_names_every_process_and_the_placement() -> None:
    text = text_of(status_view(serving_status(3)))
    for name in ("shard-0", "shard-1", "worker-0", "gateway-0"):
        assert name in text
    assert "1.0 GiB" in text
    assert "serving, placement version 3" in text
    assert "rebalance: idle; 0 done, 0 aborted" in text


def test_a_system_that_does_not_serve_says_so() -> None:
    assert "not serving, placement version 1" in text_of(status_view(replace(serving_status(), is_serving=False)))


def test_what_is_away_is_named_while_the_others_answer() -> None:
    status = serving_status()
    lost = tuple((name, DOWN if name == "shard-1" else health) for name, health in status.processes)
    text = text_of(status_view(replace(status, processes=lost, is_serving=False)))
    assert "serving without shard-1, placement version 1" in text


def test_a_rebalance_under_way_shows_its_version_and_the_share_that_was_read() -> None:
    status = RebalanceStatus(
        state=RebalanceState.STAGING, target_version=4, moved_bytes=2**20, planned_bytes=2**22, num_done=2
    )
    assert rebalance_line(status) == "staging version 4, 1.0 MiB of 4.0 MiB (25%); 2 done, 0 aborted"
    later = replace(status, state=RebalanceState.DRAINING, moved_bytes=2**22)
    assert rebalance_line(later).startswith("draining version 4; ")


def test_an_ended_rebalance_shows_how_and_when() -> None:
    status = RebalanceStatus(num_aborted=1, last_result="version 2 was given up: shard-1 was lost")
    assert rebalance_line(status) == "idle; 0 done, 1 aborted; latest: version 2 was given up: shard-1 was lost"
    assert "latest success 1 min 35 s ago" in rebalance_line(replace(status, num_done=1, seconds_since_success=95.0))


def test_how_the_one_before_ended_stays_while_the_next_is_under_way() -> None:
    status = RebalanceStatus(
        state=RebalanceState.DRAINING, target_version=4, num_done=1, last_result="version 3 is served", reason="drain"
    )
    assert rebalance_line(status) == "draining version 4, drain; 1 done, 0 aborted; latest: version 3 is served"


def test_moves_are_added_up_by_shard() -> None:
    text = text_of(plan_view(rebalance_message(rebalance_plan(), is_dry_run=True)))
    assert "placement version 1 → 2" in text
    assert rows_of(text) == [["0", "2", "2.0 MiB"], ["1", "1", "3.0 MiB"], ["all", "3", "5.0 MiB"]]


def test_a_plan_shows_what_it_gains_and_why_it_would_be_done() -> None:
    text = text_of(plan_view(rebalance_message(rebalance_plan(), is_dry_run=True)))
    assert "0.500 → 0.875" in text
    assert "x 0.750 (-25.0%)" in text
    assert "12,345" in text
    assert "worth it by itself: yes, expected to save 25.0% of the experts' time" in text


def test_a_plan_without_moves_says_so_and_why() -> None:
    text = text_of(plan_view(rebalance_message(rebalance_plan(moves=()), is_dry_run=True)))
    assert "no shard has anything to read" in text
    assert "worth it by itself: no, the placement is already the one" in text


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (61, "1 min 1 s"), (7380, "2 h 3 min")])
def test_durations_are_written_in_units_that_people_use(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
