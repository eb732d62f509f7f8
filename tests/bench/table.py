"""The bench's rows as one table for the terminal."""

from collections.abc import Sequence

from rich import box
from rich.console import JustifyMethod, RenderableType
from rich.markup import escape
from rich.table import Table

from tests.bench.row import PROBES, WHY, Param, Row

NAMED = ("against", "peer")  # params of words that need their name beside them


def table_of(rows: Sequence[Row]) -> RenderableType:
    """Every row in its order; a missing one says why. Columns of which no row has anything are left out."""
    table = Table(title="bench", title_justify="left", caption=_CAPTION, caption_justify="left")
    table.box, table.padding, table.pad_edge = box.SIMPLE_HEAD, (0, 1), False
    cells = [_cells(row) for row in rows]
    used = [i for i, heading in enumerate(_HEADINGS) if i < NUM_ALWAYS or any(texts[i] for texts in cells)]
    for i in used:
        is_words = i < NUM_WORDS or i == len(_HEADINGS) - 1
        justify: JustifyMethod = "left" if is_words else "right"
        table.add_column(_HEADINGS[i], justify=justify, overflow="fold", min_width=MIN_WIDTH if is_words else None)
    last = ""
    for row, texts in zip(rows, cells, strict=True):
        if last and row.name.split(",")[0] != last.split(",")[0]:
            table.add_section()
        table.add_row(*(texts[i] if i or row.name != last else "" for i in used))
        last = row.name
    return table


_HEADINGS = ("what", "of", "median", *PROBES, "of limit", "against peers")
NUM_WORDS, NUM_ALWAYS = 2, 3  # columns: of words, and that are there whatever the rows say
MIN_WIDTH = 12  # of words, in a narrow terminal
_CAPTION = (
    "+-: half of p90 - p10 over the median. read, peak: what the machine gave in the same minutes. of limit: of "
    "what these allow, at 16 bits a bf16 weight; above 100 % where fewer bytes are read (bf16 kept in 12 bits) or less "
    "is done than the limit counts; of placement: of the time it may take. against peers: how many times better than "
    "each, measured in turn."
)


def _cells(row: Row) -> list[str]:
    """One for each heading."""
    text = escape(label_of(row))
    if row.is_missing:
        why = escape(str(row.params.get(WHY, "not measured")))
        return [row.name, f"{text}\n[yellow]{why}[/yellow]", "[yellow]-[/yellow]", *[""] * (len(_HEADINGS) - 3)]
    return [
        row.name,
        text,
        f"{format_number(row.value)} {row.unit}" + (f" +- {row.spread:.0%}" if row.spread else ""),
        *(_probe(row.params.get(probe)) for probe in PROBES),
        "" if row.limit_fraction is None else f"{row.limit_fraction:.0%}",
        "\n".join(f"{ratio:.2f} x {escape(peer)}" for peer, ratio in row.ratios.items()),
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
