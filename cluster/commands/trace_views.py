"""What a person sees of a replay: one table, and pictures where matplotlib is installed."""

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.byte_count import format_bytes
from router.trace.model_shape import ModelShape
from router.trace.replay import HASHED_POLICIES, ReplayCase, ReplayResult, ReplaySettings
from router.trace.trace import TraceHeader

_PLOT_DPI = 150
_LINES = ("-", "--", ":", "-.")
VIEW_WIDTH = 118  # columns that the table needs


class CannotPlot(Exception):
    """The pictures cannot be drawn; the message says what is missing."""


def replay_view(
    header: TraceHeader, num_tokens: int, settings: ReplaySettings, results: Sequence[ReplayResult]
) -> RenderableType:
    """Policies side by side, for each number of shards and redundancy; under it how to read it."""
    title = Text(_printable(f"{header.source}; {_describe(header.model)}"), style="table.title")
    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False, collapse_padding=True
    )
    table.add_column("shards\n+ extra", no_wrap=True)
    table.add_column("policy", no_wrap=True)
    for heading in (
        *("balance\ntotal", "balance\nlayer", "hottest\nmean", "hottest\np99", "ranks\nmean", "ranks\nmax"),
        *("bytes\na token", "weights\na shard", "moved", "step\nms"),
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    group = ""
    for result in results:
        case = result.case
        shown, group = group, size_of(case)
        if shown and shown != group:
            table.add_section()
        table.add_row("" if shown == group else group, case.policy, *_cells(result))
    return Group(table, Text(_legend(header.model, num_tokens, settings), style="dim"))


def _printable(text: str) -> str:
    """What a file says may hold anything, and goes to a terminal."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def replay_json(result: ReplayResult) -> dict[str, str | int | float]:
    """What --json prints of a case that has a placement; step_time in seconds."""
    assert result.score is not None, "only what was placed has figures"
    score = result.score
    return {
        "policy": result.case.policy,
        "shards": result.case.ep_size,
        "redundancy": result.case.redundancy,
        "balancedness_total": score.balancedness_total,
        "balancedness_layer_p01": score.balancedness_layer_p01,
        "ranks_per_token_mean": score.ranks_per_token_mean,
        "ranks_per_token_max": score.ranks_per_token_max,
        "bytes_per_token": score.bytes_per_token,
        "moved_bytes": result.moved_bytes,
        "step_time": score.step_time_s,
    }


def size_of(case: ReplayCase) -> str:
    """ "12 +25%": shards, and replicas beyond the least."""
    return f"{case.ep_size} +{case.redundancy * 100:g}%"


def check_plot() -> None:
    """Raises CannotPlot without matplotlib: better before minutes of work than after."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise CannotPlot(
            "--plot needs matplotlib, which is not installed: pip install 'mobula-serve[train]', or leave --plot out"
        ) from error


def plot_replay(results: Sequence[ReplayResult], path: Path) -> None:
    """Bars of the figures that differ, and balancedness over time. Raises CannotPlot, OSError, ValueError."""
    check_plot()
    from matplotlib.figure import Figure

    placed = [result for result in results if result.score is not None]
    panels = (
        ("balancedness over all layers", [r.score.balancedness_total for r in placed if r.score]),
        ("hottest shard in a layer, p99", [r.score.hottest_p99 for r in placed if r.score]),
        ("shards visited per token", [r.score.ranks_per_token_mean for r in placed if r.score]),
        ("MB per token", [r.score.bytes_per_token / 1e6 for r in placed if r.score]),
        ("expected step, ms", [r.score.step_time_s * 1e3 for r in placed if r.score]),
    )
    labels = [_label(result.case) for result in placed]
    policies = list(dict.fromkeys(result.case.policy for result in placed))
    colours = [f"C{policies.index(result.case.policy)}" for result in placed]
    figure = Figure(figsize=(11, 2.4 * 3 + 0.22 * len(placed) * 2), layout="constrained")
    axes = figure.subplots(3, 2).ravel()
    for axis, (title, values) in zip(axes, panels, strict=False):
        axis.barh(labels, values, color=colours)
        axis.set_title(title)
        axis.invert_yaxis()
    for result, label, colour in zip(placed, labels, colours, strict=True):
        assert result.score is not None, "only what was placed is drawn"
        sizes = list(dict.fromkeys((each.case.ep_size, each.case.redundancy) for each in placed))
        style = _LINES[sizes.index((result.case.ep_size, result.case.redundancy)) % len(_LINES)]
        axes[-1].plot(result.score.balancedness_by_step, style, color=colour, linewidth=1, label=label)
    axes[-1].set_title("balancedness over all layers, step by step")
    axes[-1].set_ylim(0, 1)
    axes[-1].set_xlabel("step")
    if len(placed) <= 8:
        axes[-1].legend(fontsize="small")
    figure.savefig(path, dpi=_PLOT_DPI)


def _cells(result: ReplayResult) -> list[str]:
    score = result.score
    if score is None:
        return ["-"] * 10
    return [
        f"{score.balancedness_total:.3f}",
        f"{score.balancedness_layer_p01:.3f}",
        f"{score.hottest_mean:.2f}",
        f"{score.hottest_p99:.2f}",
        f"{score.ranks_per_token_mean:.2f}",
        str(score.ranks_per_token_max),
        *map(format_bytes, (score.bytes_per_token, result.weight_bytes, result.moved_bytes)),
        f"{score.step_time_s * 1e3:.2f}",
    ]


def _legend(model: ModelShape, num_tokens: int, settings: ReplaySettings) -> str:
    num_training = int(num_tokens * settings.training_share)
    cost = settings.cost_model
    part = "n_group" if model.gate.is_group_limited else "shards"
    moves = ", as few as pay" if settings.is_rebalance else "; --from-static places with fewer moves"
    hashed = ", ".join(sorted(HASHED_POLICIES))
    return (
        f"placed by the first {num_training:,} tokens, scored on the {num_tokens - num_training:,} after them, in "
        f"steps of {settings.step_tokens}\n"
        f"extra: replicas as a share of all units; which is asked: {hashed} by a hash of (token, expert), the "
        "others as the router\n"
        "balance: mean over max of the shards' load, 1 is even; total: over all layers; layer: their 1st percentile\n"
        f"hottest: the hottest shard within a layer over the layer's load / {part}; mean and 99th percentile\n"
        "ranks: shards a token visits in a layer; bytes: both ways, all layers\n"
        f"moved: what shards that hold the static placement would fetch{moves}\n"
        f"step: sum over layers of (hottest shard at {cost.flops_per_s / 1e12:g} TFLOP/s "
        f"+ {cost.message_s * 1e6:g} us a shard asked + bytes at {cost.bytes_per_s / 1e9:g} GB/s), "
        f"{cost.steps_in_flight} in flight"
    )


def _describe(model: ModelShape) -> str:
    gate = model.gate
    groups = f", {gate.n_group} groups limited to {gate.topk_group}" if gate.is_group_limited else ", no groups"
    return (
        f"{model.name}: {model.num_moe_layers} layers x {gate.n_routed_experts} experts, {model.top_k} a token{groups}"
    )


def _label(case: ReplayCase) -> str:
    return f"{case.policy}, {size_of(case)}"
