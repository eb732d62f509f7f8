"""The bench's rows as one table for the terminal."""

from collections.abc import Sequence

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from tests.bench.row import PROBES, WHY, Param, Row

NAMED = ("against", "peer")  # params of words that need their name beside them


def table_of(rows: Sequence[Row]) -> RenderableType:
    """Every row in its order; a missing one says why. A column for each peer that any row was compared with."""
    peers = list(dict.fromkeys(peer for row in rows for peer in row.ratios))
    table = Table(title="bench", title_justify="left", caption=_CAPTION, caption_justify="left")
    for heading in ("what", "of"):
        table.add_column(heading, overflow="fold")
    for heading in ("median", "spread", *PROBES, "of limit", *(f"x {peer}" for peer in peers)):
        table.add_column(heading, justify="right")
    last = ""
    for row in rows:
        if last and row.name.split(",")[0] != last.split(",")[0]:
            table.add_section()
        table.add_row(row.name if row.name != last else "", *_cells(row, peers))
        last = row.name
    return table


_CAPTION = (
    "spread: half of p90 - p10 over the median. read, peak: what the machine gave in the same minutes. of limit: of "
    "what these allow. x: times better than the peer, measured in turn."
)


def _cells(row: Row, peers: Sequence[str]) -> list[str]:
    text = escape(label_of(row))
    if row.is_missing:
        return [f"{text}\n[yellow]{escape(str(row.params.get(WHY, 'not measured')))}[/yellow]", "[yellow]-[/yellow]"]
    return [
        text,
        f"{format_number(row.value)} {row.unit}",
        f"{row.spread:.0%}" if row.spread else "",
        *(_probe(row.params.get(probe)) for probe in PROBES),
        "" if row.limit_fraction is None else f"{row.limit_fraction:.0%}",
        *(f"{row.ratios[peer]:.2f}" if peer in row.ratios else "" for peer in peers),
    ]


def label_of(row: Row) -> str:
    """Its params in words, without the probes."""
    hidden = (*PROBES, WHY)
    return " ".join(_param(name, value) for name, value in row.params.items() if name not in hidden)


def format_number(value: float) -> str:
    """Three digits or more."""
    size = abs(value)
    return f"{value:,.0f}" if size >= 1000 else f"{value:.1f}" if size >= 100 else f"{value:.3g}"


def _param(name: str, value: Param) -> str:
    return str(value) if isinstance(value, str) and name not in NAMED else f"{name} {value}"


def _probe(value: Param | None) -> str:
    return "" if value is None else format_number(float(value))
