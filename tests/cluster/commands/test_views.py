"""What the terminal shows, read as text."""

from io import StringIO

import pytest
from rich.console import Console, RenderableType

from cluster.client import Generation
from cluster.commands.views import (
    experts_view,
    format_bytes,
    format_count,
    kinds_view,
    processes_view,
    streams_view,
    summary_view,
)
from cluster.controller.process import ClusterStatus, ProcessHealth, ProcessState
from protos import generation_pb2 as pb


def text_of(view: RenderableType, width: int = 100) -> str:
    console = Console(file=StringIO(), width=width)
    console.print(view)
    return console.file.getvalue()  # type: ignore[attr-defined]


def load(*counts: int) -> pb.GetExpertLoadResponse:
    response = pb.GetExpertLoadResponse()
    response.layers.add(layer_id=3, num_tokens=counts)
    response.shards.add(ep_rank=0, num_units=2, num_assignments=30, num_rows=20)
    response.shards.add(ep_rank=1, num_units=2, num_assignments=10, num_rows=10)
    response.dispatch.num_tokens_by_ranks.extend([0, 30, 10])
    response.dispatch.max_ranks_per_token = 3
    return response


def test_the_hottest_and_coldest_experts_are_named() -> None:
    text = text_of(experts_view(load(10, 40, 0, 10), pb.GetPlacementResponse(ep_size=2), 100))
    assert "1 (2.7x)" in text
    assert "2 (0.0x)" in text


def test_shares_of_work_and_of_shards_visited_add_up() -> None:
    text = text_of(experts_view(load(10, 40, 0, 10), pb.GetPlacementResponse(ep_size=2), 100))
    assert "75%" in text
    assert "25%" in text
    assert "mean 1.25, over the limit: 0" in text


def test_a_system_without_any_tokens_yet_says_so_instead_of_drawing_nothing() -> None:
    assert "no token has been routed yet" in text_of(experts_view(load(0, 0, 0), pb.GetPlacementResponse(), 100))


def test_a_violated_limit_is_counted() -> None:
    broken = load(1, 1)
    broken.dispatch.max_ranks_per_token = 1
    broken.dispatch.num_device_limit_violations = 10
    assert "over the limit: 10" in text_of(experts_view(broken, pb.GetPlacementResponse(ep_size=2), 100))


def test_tokens_that_visited_more_shards_while_there_were_more_violate_nothing() -> None:
    fewer = load(1, 1)
    fewer.dispatch.max_ranks_per_token = 1
    assert "over the limit: 0" in text_of(experts_view(fewer, pb.GetPlacementResponse(ep_size=1), 100))


def test_what_the_overload_valve_dropped_is_shown_if_anything() -> None:
    overloaded = load(1, 1)
    assert "valve" not in text_of(experts_view(overloaded, pb.GetPlacementResponse(ep_size=2), 100))
    overloaded.dispatch.num_dropped_assignments = 17
    text = text_of(experts_view(overloaded, pb.GetPlacementResponse(ep_size=2), 100))
    assert "dropped by the overload valve: 17" in text


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize("num_experts", [32, 160])
def test_what_the_demo_shows_fits_a_narrow_terminal_whole(width: int, num_experts: int) -> None:
    counted = load(*range(num_experts))
    for shard in counted.shards:
        shard.num_forwards = shard.num_rows = 123_456_789
        shard.weight_bytes = 19 * 2**20
    generation = Generation("x" * 100, token_ids=[0] * 96, first_token_s=1.234, total_s=2.0, finish_reason="length")
    views = (
        summary_view([generation], 2.0),
        experts_view(counted, pb.GetPlacementResponse(ep_size=2), width),
        kinds_view({"Python": counted, "English": counted}, width),
    )
    for view in views:
        text = text_of(view, width)
        assert "…" not in text
        assert max(len(line) for line in text.splitlines()) <= width
    assert "tokens/s" in text_of(views[0], width)


@pytest.mark.parametrize(
    ("count", "text"), [(7, "7"), (999_999, "999,999"), (12_345_678, "12.3M"), (3 * 10**9, "3.0G")]
)
def test_counts_stay_short(count: int, text: str) -> None:
    assert format_count(count) == text


def test_where_a_process_listens_and_what_it_is_about_are_both_shown_on_a_narrow_terminal() -> None:
    health = ProcessHealth(
        generation="a",
        state=ProcessState.READY,
        pid=1_234_567,
        address="10.0.0.1:50051",
        num_units=10,
        weight_bytes=10**9,
        detail="is drained",
    )
    status = ClusterStatus(processes=(("gateway-0", health),), is_serving=True, placement_version=1)
    text = text_of(processes_view(status), 60)
    assert "…" not in text
    assert "10.0.0.1:50051" in text
    assert "drained" in text


def test_a_layer_wider_than_the_terminal_is_summed_over_neighbours() -> None:
    text = text_of(experts_view(load(*range(256)), pb.GetPlacementResponse(ep_size=2), 100), width=100)
    assert max(len(line) for line in text.splitlines()) <= 100


def test_nothing_served_yet_is_no_division_by_zero() -> None:
    only_counted = pb.GetExpertLoadResponse()
    only_counted.layers.add(layer_id=3, num_tokens=[1])
    assert "over the limit: 0" in text_of(experts_view(only_counted, pb.GetPlacementResponse(), 80))


def test_kinds_of_prompt_are_compared_with_the_first() -> None:
    text = text_of(kinds_view({"Python": load(10, 0), "English": load(0, 10)}, 80))
    assert "100%" in text


def test_processes_show_their_state_and_why_they_failed() -> None:
    failed = ProcessHealth(generation="a", state=ProcessState.FAILED, detail="disk [a] is full", pid=7)
    status = ClusterStatus(processes=(("shard-0", failed),), is_serving=False, placement_version=1)
    text = text_of(processes_view(status))
    assert "failed" in text
    assert "disk [a] is full" in text
    assert "waiting for Ray" in text_of(processes_view(None))


def test_long_streams_show_their_end() -> None:
    generation = Generation("p", text="\n".join(f"line {number}" for number in range(50)), token_ids=[0] * 50)
    text = text_of(streams_view([generation], 80))
    assert "line 49" in text
    assert "line 3 " not in text


def test_sizes_are_written_in_binary_units() -> None:
    assert [format_bytes(size) for size in (5, 2048, 3 * 2**20, 5 * 2**30)] == ["5 B", "2.0 KiB", "3.0 MiB", "5.0 GiB"]
