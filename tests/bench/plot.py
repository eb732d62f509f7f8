"""A picture of the bench for the docs, from its JSON: how near the limit, and how many times better than each peer.

python -m tests.bench.plot bench.json bench.svg        (matplotlib comes with the `train` extra)
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.row import Row, load
from tests.bench.table import format_number, label_of

INCHES_PER_ROW = 0.28
MAX_RATIO = 5.0  # longer bars are cut and say their number


def charted(rows: Sequence[Row]) -> list[Row]:
    """Those that say something of a limit or a peer."""
    return [row for row in rows if not row.is_missing and (row.limit_fraction is not None or row.ratios)]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Writes an SVG or PNG, by the name's ending."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    rows = charted(rows)
    peers = list(dict.fromkeys(peer for row in rows for peer in row.ratios))
    figure, (left, right) = pyplot.subplots(
        1, 2, sharey=True, figsize=(11, 1.2 + INCHES_PER_ROW * max(1, len(rows))), layout="constrained"
    )
    places = range(len(rows))
    left.barh(places, [100 * (row.limit_fraction or 0.0) for row in rows], color="tab:blue")
    left.set_yticks(places, [f"{row.name}: {label_of(row)}" for row in rows], fontsize=7)
    left.invert_yaxis()
    left.axvline(100, color="black", linewidth=0.8)
    left.set_xlabel("per cent of the machine's limit")
    for place, row in enumerate(rows):
        left.text(1, place, f"{format_number(row.value)} {row.unit}", va="center", fontsize=6)
    _draw_ratios(right, rows, peers)
    figure.savefig(path)
    pyplot.close(figure)


def _draw_ratios(axes: Any, rows: Sequence[Row], peers: Sequence[str]) -> None:
    height = 0.8 / max(1, len(peers))
    for number, peer in enumerate(peers):
        places = [place - 0.4 + height * (number + 0.5) for place in range(len(rows))]
        axes.barh(places, [min(MAX_RATIO, row.ratios.get(peer, 0.0)) for row in rows], height=height, label=peer)
        for place, row in zip(places, rows, strict=True):
            if row.ratios.get(peer, 0.0) > MAX_RATIO:
                axes.text(MAX_RATIO, place, f" {format_number(row.ratios[peer])}", va="center", fontsize=6)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times better than the peer")
    if peers:
        axes.legend(fontsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    draw(load(arguments.rows), arguments.picture)


if __name__ == "__main__":
    main()
