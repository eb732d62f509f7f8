"""`make bench`: measures part after part, prints one table, writes the rows as JSON.

    python -m tests.bench [--only wire,kernels,...] [--models lite4,tiny] [--formats bf16,int8,int4] [--out bench.json]
                          [--no-peers] [--quick]

What a part cannot measure stands in its row's place with the reason; the exit status is 1 if there was any.
"""

import argparse
import importlib
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from cluster.commands.terminal import signals_as_ctrl_c, status_of
from tests.bench import checkpoints
from tests.bench.row import FORMATS, Options, Row, Unmeasurable, dump
from tests.bench.table import table_of

logger = logging.getLogger(__name__)

PARTS = (
    "wire",
    "kernels",
    "cold",
    "layers",
    "decode",
    "prefill",
    "startup",
    "memory",
    "context",
    "placement",
    "rebalance",
    "overload",
)
NOT_BUILT = {"cache": "the prefix cache is not built yet"}
PLAIN_WIDTH = 160  # of a table that is not for a terminal
MODELS = ("lite4", "tiny")
MAX_MINUTES, QUICK_MINUTES = 25.0, 5.0


def parse_options(arguments: Sequence[str]) -> tuple[Options, Path | None]:
    """The options and where to write the rows. Ends the program with usage when they cannot be understood."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help=f"parts, with commas; all: {','.join(PARTS)}")
    parser.add_argument("--models", default="", help=f"checkpoints or folders, with commas; unset: {','.join(MODELS)}")
    parser.add_argument("--formats", default="", help=f"of experts, with commas; all: {','.join(FORMATS)}")
    parser.add_argument("--out", type=Path, help="where to write the rows as JSON")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="those that are installed")
    parser.add_argument("--quick", action="store_true", help="fewer cells and repeats, and no large checkpoint")
    parser.add_argument("--cores", type=int, default=0, help="of this machine to use; 0: all")
    parser.add_argument("--max-minutes", type=float, help="no measurement begins after")
    parser.add_argument("--folder", type=Path, default=None, help="where made checkpoints are kept")
    parsed = parser.parse_args(arguments)
    only = _names(parsed.only) or PARTS
    if unknown := [part for part in only if part not in (*PARTS, *NOT_BUILT)]:
        parser.error(f"no part {', '.join(unknown)}; parts are {', '.join((*PARTS, *NOT_BUILT))}")
    formats = _names(parsed.formats) or FORMATS
    if unknown := [kind for kind in formats if kind not in FORMATS]:
        parser.error(f"no format {', '.join(unknown)}; formats are {', '.join(FORMATS)}")
    num_cores = len(os.sched_getaffinity(0))
    if not 0 <= parsed.cores <= num_cores:
        parser.error(f"--cores is {parsed.cores}, this machine has {num_cores}")
    minutes = QUICK_MINUTES if parsed.quick else MAX_MINUTES
    if parsed.max_minutes is not None:
        minutes = parsed.max_minutes
        if not minutes > 0:  # NaN too
            parser.error(f"--max-minutes is {minutes}, must be more than 0")
    folder = parsed.folder or checkpoints.default_folder()
    models = _names(parsed.models) or (MODELS[1:] if parsed.quick else MODELS)
    for name in models:
        if not checkpoints.is_known(folder, name):
            parser.error(checkpoints.unknown(name))
    if parsed.out and (why := _why_not_writable(parsed.out)):
        parser.error(f"--out {parsed.out} cannot be written: {why}")
    options = Options(
        only=only,
        models=models,
        formats=formats,
        folder=folder,
        num_threads=parsed.cores or num_cores,
        has_peers=parsed.peers,
        is_quick=parsed.quick,
        deadline_s=time.monotonic() + 60 * minutes,
    )
    return options, parsed.out


def measure(part: str, options: Options) -> Iterator[Row]:
    """The part's rows; what ends it early stands in a missing row."""
    if part in NOT_BUILT:
        yield Row.missing(part, {}, NOT_BUILT[part])
        return
    try:
        options.check_time(5.0)
        yield from importlib.import_module(f"tests.bench.{part}").rows(options)
    except Unmeasurable as error:
        yield Row.missing(part, {}, str(error))
    except Exception as error:  # the top of a part: the others still run
        logger.exception("%s", part)
        yield Row.missing(part, {}, f"{type(error).__name__}: {error}")


def main() -> int:
    """0 when every row was measured and written, 130 after Ctrl-C, 143 after SIGTERM."""
    logging.basicConfig(level=logging.ERROR)
    options, out = parse_options(sys.argv[1:])
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.num_threads])  # children keep to them
    torch.set_num_threads(1)  # the client's; probes and kernels ask for their own
    console = Console()
    if not console.is_terminal:
        console = Console(width=PLAIN_WIDTH)
    with signals_as_ctrl_c():
        return run(options, out, console)


def run(options: Options, out: Path | None, console: Console) -> int:
    """Measures and prints the table, after Ctrl-C the rows so far. Returns the exit status."""
    rows: list[Row] = []
    unsaved, status = "", 0
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("", total=len(options.only))
            for part in options.only:
                shown = options.showing(partial(_show, progress, task, part))
                shown.show("")
                for row in measure(part, shown):
                    rows.append(row)
                    if out:  # after each row: a killed run keeps what it has
                        unsaved = _save(rows, out)
                progress.advance(task)
    except KeyboardInterrupt as interrupt:
        status = status_of(interrupt)
    if rows:
        console.print(table_of(rows))
    if unsaved:
        console.print(f"not every row is in {out}: {unsaved}", markup=False)
    if status:
        console.print("interrupted; what was not measured yet is missing")
    return status or int(bool(unsaved) or any(row.is_missing for row in rows))


def _save(rows: Sequence[Row], out: Path) -> str:
    """Why they cannot be written; empty when they are."""
    try:
        dump(rows, out)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _why_not_writable(path: Path) -> str:
    """Empty if it can be. Leaves everything as it was."""
    is_there = path.exists()
    try:
        path.open("a").close()
        if not is_there:
            path.unlink()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _show(progress: Progress, task: TaskID, part: str, text: str) -> None:
    progress.update(task, description=f"{part}: {text}")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in map(str.strip, text.split(",")) if name)


if __name__ == "__main__":
    sys.exit(main())
