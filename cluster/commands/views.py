"""What a person sees in the terminal: processes, expert load, where tokens went. Turns messages into rich tables."""

from collections.abc import Sequence

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from cluster.byte_count import format_bytes
from cluster.client import Generation
from cluster.controller.process import ClusterStatus, ProcessState
from protos import generation_pb2

STATE_STYLES = {
    ProcessState.STARTING: "dim",
    ProcessState.NEW: "dim",
    ProcessState.LOADING: "yellow",
    ProcessState.READY: "green",
    ProcessState.FAILED: "bold red",
    ProcessState.DOWN: "dim",
}
BARS = "▁▁▂▃▄▅▆▇█"  # shape besides colour, for terminals and eyes without it
SHADES = (
    "grey42",
    "grey54",
    "dark_blue",
    "blue3",
    "dodger_blue2",
    "deep_sky_blue1",
    "turquoise2",
    "spring_green2",
    "yellow1",
)
BAR_WIDTH = 24  # of a bar that stands for everything
SHARE_WIDTH = 12  # the same, in the last column of many
MAX_HEAT_COLUMNS = 64  # wider layers are summed over neighbouring experts
BESIDE_HEAT = 34  # columns of a terminal for what stands beside a heat map
PROMPT_CHARS = 16  # of a prompt in a table


def processes_view(status: ClusterStatus | None) -> RenderableType:
    """One line a process."""
    if status is None or not status.processes:
        return Text("waiting for Ray to place the processes ...", style="dim")
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    for heading in ("process", "state", "pid", "units", "weights"):
        table.add_column(heading, style="bold" if heading == "process" else None, no_wrap=True)
    table.add_column("address", overflow="fold")
    for name, health in status.processes:
        is_up = health.pid != 0
        table.add_row(
            name,
            Text(health.state.value, style=STATE_STYLES[health.state]),
            str(health.pid) if is_up else "",
            str(health.num_units) if health.num_units else "",
            format_bytes(health.weight_bytes) if health.weight_bytes else "",
            Text(" ".join(text for text in (health.address, health.detail) if text)),  # no markup: it may hold brackets
        )
    return table


def streams_view(generations: list[Generation], width: int) -> RenderableType:
    """One panel a prompt, its text so far after the prompt."""
    per_row = 2 if width >= 100 else 1
    panel_width = (width - 2) // per_row - 1
    panels = []
    for generation in generations:
        text = Text(generation.prompt, style="bold cyan")
        text.append(_tail(generation.text, panel_width), style="default not bold")
        state = generation.finish_reason or ("..." if generation.first_token_s else "waiting")
        subtitle = f"{generation.num_tokens} tokens, {state}"
        panels.append(
            Panel(
                text,
                subtitle=subtitle,
                width=panel_width,
                height=11,
                border_style="green" if generation.finish_reason else "blue",
            )
        )
    return Columns(panels, padding=(0, 1))


def summary_view(generations: list[Generation], wall_s: float) -> RenderableType:
    """Latency and throughput of each stream and of all together."""
    table = Table(title="requests", title_justify="left", box=None, pad_edge=False)
    table.add_column("\nprompt", no_wrap=True)
    for heading in ("prompt\ntokens", "new\ntokens", "first\ntoken", "\ntokens/s", "\nend"):
        table.add_column(heading, justify="right", no_wrap=True)
    for generation in generations:
        rate = generation.num_tokens / generation.total_s if generation.total_s else 0.0
        first = f"{generation.first_token_s * 1000:.0f} ms" if generation.first_token_s else "-"
        table.add_row(
            Text(generation.prompt.strip().splitlines()[0][:PROMPT_CHARS]),
            str(generation.usage.num_prompt_tokens),
            str(generation.num_tokens),
            first,
            f"{rate:.1f}",
            generation.finish_reason,
        )
    total = sum(generation.num_tokens for generation in generations)
    table.add_section()
    table.add_row("all together", "", str(total), "", f"{total / wall_s:.1f}", f"{wall_s:.1f} s")
    return table


def experts_view(
    load: generation_pb2.GetExpertLoadResponse, placement: generation_pb2.GetPlacementResponse, width: int
) -> RenderableType:
    """Heat map of layers x experts, load by shard, and shards visited per token against the limit."""
    if not any(sum(layer.num_tokens) for layer in load.layers):
        return Text("no token has been routed yet: generate something, then look again")
    return Group(_heat_map(load, width), Text(), _shard_table(load), Text(), _ranks_view(load, placement))


def kinds_view(load_by_kind: dict[str, generation_pb2.GetExpertLoadResponse], width: int) -> RenderableType:
    """Heat maps of the same layers under different kinds of prompt, and how far apart they are."""
    kinds = list(load_by_kind)
    title = Text("kinds of prompt use different experts: load of each layer's experts by kind", style="italic")
    table = Table(box=None, padding=(0, 1))
    table.add_column("layer", justify="right")
    for heading in ("\nkind", "\nexperts 0 .. n", f"not shared\nwith {kinds[0]}"):
        table.add_column(heading, no_wrap=True)
    layers = [load.layers for load in load_by_kind.values()]
    for rows in zip(*layers, strict=True):
        shares = [[count / (sum(row.num_tokens) or 1) for count in row.num_tokens] for row in rows]
        for kind, share in zip(kinds, shares, strict=True):
            apart = sum(abs(a - b) for a, b in zip(share, shares[0], strict=True)) / 2  # total variation distance
            is_first = kind == kinds[0]
            table.add_row(
                str(rows[0].layer_id) if is_first else "",
                kind,
                _cells(_merge_columns(share, width), 1),
                "" if is_first else f"{apart:.0%}",
            )
    return Group(title, table)


def format_count(count: int) -> str:
    """A number of things, in at most seven characters up to a million million."""
    for unit, size in (("G", 10**9), ("M", 10**6)):
        if count >= size:
            return f"{count / size:,.1f}{unit}"
    return f"{count:,}"


def _heat_map(load: generation_pb2.GetExpertLoadResponse, width: int) -> RenderableType:
    title = Text("expert load: tokens computed by each routed expert, against its layer's mean", style="italic")
    table = Table(box=None, padding=(0, 1))
    table.add_column("layer", justify="right")
    table.add_column("experts 0 .. n")
    table.add_column("hottest", justify="right")
    table.add_column("coldest", justify="right")
    for layer in load.layers:
        counts = _merge_columns(list(layer.num_tokens), width)
        cell_width = 2 if 2 * len(counts) + BESIDE_HEAT <= width else 1
        mean = sum(counts) / max(1, len(counts)) or 1.0
        cells = _cells(counts, cell_width)
        tokens = layer.num_tokens
        hottest = max(range(len(tokens)), key=lambda expert: tokens[expert])
        coldest = min(range(len(tokens)), key=lambda expert: tokens[expert])
        hot, cold = f"{hottest} ({max(counts) / mean:.1f}x)", f"{coldest} ({min(counts) / mean:.1f}x)"
        table.add_row(str(layer.layer_id), cells, hot, cold)
    return Group(title, table)


def _shard_table(load: generation_pb2.GetExpertLoadResponse) -> RenderableType:
    table = Table(title="load by expert shard", title_justify="left", box=None, padding=(0, 1), collapse_padding=True)
    for heading in ("\nshard", "\nunits", "\nweights", "\ncalls", "\nrows", "row-\nexperts"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("share of\nthe work", no_wrap=True)
    total = sum(shard.num_assignments for shard in load.shards) or 1
    for shard in load.shards:
        share = shard.num_assignments / total
        bar = Text("█" * round(share * SHARE_WIDTH), style="spring_green2")
        bar.append(f" {share:.0%}", style="default")
        table.add_row(
            str(shard.ep_rank),
            str(shard.num_units),
            format_bytes(shard.weight_bytes),
            format_count(shard.num_forwards),
            format_count(shard.num_rows),
            format_count(shard.num_assignments),
            bar,
        )
    return table


def _ranks_view(
    load: generation_pb2.GetExpertLoadResponse, placement: generation_pb2.GetPlacementResponse
) -> RenderableType:
    counts = list(load.dispatch.num_tokens_by_ranks)
    total = sum(counts) or 1
    limit = load.dispatch.max_ranks_per_token
    over = load.dispatch.num_device_limit_violations  # counted at the time: with more shards the limit was another one
    table = Table(box=None)
    table.add_column("shards", justify="right")
    table.add_column("share of tokens")
    for ranks in range(1, max(limit, len(counts) - 1) + 1):
        count = counts[ranks] if ranks < len(counts) else 0
        bar = Text(
            "█" * round(count / total * BAR_WIDTH), style="deep_sky_blue1" if ranks <= limit or not over else "bold red"
        )
        bar.append(f" {count / total:.1%}", style="default")
        table.add_row(str(ranks), bar)
    visits = sum(ranks * count for ranks, count in enumerate(counts))
    verdict = Text(f"mean {visits / total:.2f}, over the limit: {over}", style="green" if not over else "bold red")
    wire = (
        f"   rows sent {format_bytes(load.dispatch.sent_bytes)}, answers {format_bytes(load.dispatch.received_bytes)}"
    )
    verdict.append(wire, style="default")
    if load.dispatch.num_dropped_assignments:
        verdict.append(f"\ndropped by the overload valve: {load.dispatch.num_dropped_assignments}", style="bold red")
    title = Text(
        f"shards visited per token and layer: limit {limit}, {placement.ep_size} shards in all", style="italic"
    )
    return Group(title, table, verdict)


def _cells(counts: list[float], cell_width: int) -> Text:
    """One bar an expert, its height and colour by the multiple of the mean."""
    mean = sum(counts) / max(1, len(counts)) or 1.0
    cells = Text()
    for count in counts:
        shade = min(len(SHADES) - 1, int(count / mean * 3))
        cells.append(BARS[shade] * cell_width, style=SHADES[shade])
    return cells


def _merge_columns(counts: Sequence[float], width: int) -> list[float]:
    """Means over so many neighbours that they fit a terminal of that width."""
    num_columns = max(1, min(MAX_HEAT_COLUMNS, width - BESIDE_HEAT))
    step = -(-len(counts) // num_columns)
    return [
        sum(counts[start : start + step]) / len(counts[start : start + step]) for start in range(0, len(counts), step)
    ]


def _tail(text: str, width: int) -> str:
    """What fits the panel: the last lines, so that new text is always seen."""
    lines = text.split("\n")
    kept: list[str] = []
    room = 8
    for line in reversed(lines):
        room -= 1 + len(line) // max(1, width - 4)
        if room < 0:
            return "…\n" + "\n".join(reversed(kept))
        kept.append(line)
    return text
