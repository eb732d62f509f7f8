"""`mobula checkpoint`: converts checkpoints and says what a conversion costs. Loads torch only when a command runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from cluster.commands.terminal import INTERRUPTED, console, errors, fail, signals_as_ctrl_c, status_of

if TYPE_CHECKING:
    from cluster.checkpoint.accuracy import Accuracy

app = typer.Typer(no_args_is_help=True, help="Convert checkpoints and compare them.")

MaxTokens = Annotated[
    int,
    typer.Option(
        min=2, help="Of the text that are read; TMPDIR needs room for as many times the vocabulary, 4 bytes each."
    ),
]
TextFile = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="UTF-8; unset: sources of Python's standard library."),
]
TOKENS = 4096


class ExpertFormat(Enum):
    """What --experts takes."""

    INT8 = "int8"
    INT4 = "int4"

    @property
    def num_bits(self) -> int:
        return 8 if self is ExpertFormat.INT8 else 4


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help='Folder, Hugging Face id, or "bundled".')],
    destination: Annotated[Path, typer.Argument(help="Folder to make.")],
    experts: Annotated[ExpertFormat, typer.Option(help="What the routed experts become.")],
    group_size: Annotated[
        int | None, typer.Option(min=1, help="Columns that share a scale; unset: 128, or the largest that fits.")
    ] = None,
    all_linear: Annotated[
        bool,
        typer.Option(
            "--all-linear", help="Attention, dense and shared feed-forward and lm_head too; not gate and kv_b_proj."
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint at DESTINATION.")] = False,
    compare: Annotated[bool, typer.Option(help="Run both checkpoints afterwards and show what it costs.")] = True,
    text: TextFile = None,
    max_tokens: MaxTokens = TOKENS,
) -> None:
    """Quantise the routed experts of a checkpoint, or all its linear layers; everything else stays as it is."""
    from cluster.checkpoint.checkpoint import Checkpoint
    from cluster.checkpoint.convert import ALL_LINEAR, EXPERTS, CannotConvert, plan
    from cluster.checkpoint.destination import InterruptedWhenMade, new_folder
    from cluster.checkpoint.json_fields import UnsupportedModel
    from cluster.checkpoint.safetensors_file import InvalidCheckpoint

    content = _content(text)
    try:
        selection = ALL_LINEAR if all_linear else EXPERTS
        opened = Checkpoint.open(_location(source))
        conversion = plan(opened, experts.num_bits, group_size, selection)
        if compare:
            _check_comparable(source, content, max_tokens)
        read, num_bytes = opened.file("config.json").parent, conversion.num_bytes
        with (
            signals_as_ctrl_c(),
            new_folder(destination, source=read, num_bytes=num_bytes, is_forced=force) as folder,
            _bytes_bar() as bar,
        ):
            what = "linear layers" if all_linear else "experts"
            task = bar.add_task(f"{what} to {conversion.matrix_format}", total=num_bytes)
            conversion.write(folder, lambda num_bytes: bar.advance(task, num_bytes))
    except (CannotConvert, InvalidCheckpoint, UnsupportedModel, OSError) as error:
        fail(str(error))
    except InterruptedWhenMade as late:
        fail(f"interrupted; {destination} is the new checkpoint", status_of(late.interrupt))
    except KeyboardInterrupt as interrupt:
        fail(f"interrupted; {destination} is as it was", status_of(interrupt))
    console.print(f"[green]wrote[/green] {escape(str(destination))}", highlight=False)
    if compare:
        _compare(source, str(destination), content, max_tokens)


@app.command(name="compare")
def compare_command(
    reference: Annotated[str, typer.Argument(help='Folder, Hugging Face id, or "bundled".')],
    candidate: Annotated[str, typer.Argument(help="The checkpoint that should answer alike.")],
    text: TextFile = None,
    max_tokens: MaxTokens = TOKENS,
) -> None:
    """Run two checkpoints over the same text and show how far apart their answers are."""
    _compare(reference, candidate, _content(text), max_tokens)


def accuracy_view(accuracy: "Accuracy", reference: str, candidate: str) -> RenderableType:
    """The figures as a table."""
    title = escape(f"{candidate} against {reference}, {accuracy.num_tokens:,} tokens")
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column("reference", justify="right")
    table.add_column("candidate", justify="right")
    change = accuracy.candidate_perplexity / accuracy.reference_perplexity - 1
    table.add_row(
        "perplexity",
        f"{accuracy.reference_perplexity:.4f}",
        f"{accuracy.candidate_perplexity:.4f} ({change:+.2%})",
    )
    table.add_row("same greedy token", "", f"{accuracy.greedy_agreement:.2%}")
    table.add_row("logit error, median", "", f"{accuracy.median_logit_error:.2%}")
    table.add_row("logit error, largest", "", f"{accuracy.max_logit_error:.2%}")
    table.caption = "logit error: the largest of a position, over the reference's largest logit there"
    table.caption_justify = "left"
    return table


def _compare(reference: str, candidate: str, content: str | None, max_tokens: int) -> None:
    from cluster.checkpoint.accuracy import compare as run

    columns = (TextColumn("{task.description}"), BarColumn())
    with (
        _comparing(),
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar,
    ):
        task = bar.add_task("", total=1.0)

        def show(stage: str, fraction: float) -> None:
            bar.update(task, description=stage, completed=fraction)

        accuracy = run(reference, candidate, text=content, max_tokens=max_tokens, on_progress=show)
    for doubt in accuracy.doubts:
        warning = f"[yellow]warning:[/yellow] are they of one model? {escape(doubt)}"
        errors.print(warning, highlight=False, soft_wrap=True)
    console.print(accuracy_view(accuracy, reference, candidate))


def _check_comparable(reference: str, content: str | None, max_tokens: int) -> None:
    """Before a conversion, which may take hours, what would end the comparison after it."""
    from cluster.checkpoint.accuracy import Reference

    with _comparing("; give --no-compare to convert without"):
        Reference.open(reference, content, max_tokens)


@contextmanager
def _comparing(hint: str = "") -> Iterator[None]:
    """What is wrong with a checkpoint, a text or this machine ends the command with the reason."""
    from cluster.checkpoint.accuracy import CannotCompare
    from cluster.checkpoint.json_fields import UnsupportedModel
    from cluster.checkpoint.safetensors_file import InvalidCheckpoint
    from cluster.config import ConfigError
    from router.placement import PlacementError

    try:
        yield
    except (CannotCompare, ConfigError, InvalidCheckpoint, UnsupportedModel, PlacementError, OSError) as error:
        fail(f"the checkpoints are not compared: {error}{hint}")
    except KeyboardInterrupt:
        fail("interrupted before the comparison was done", INTERRUPTED)


def _content(text: Path | None) -> str | None:
    try:
        return None if text is None else text.read_text(encoding="utf-8")
    except OSError as error:
        fail(f"{text}: {error.strerror}")
    except UnicodeDecodeError as error:
        fail(f"{text} is not UTF-8: {error.reason} at byte {error.start}")


def _location(source: str) -> str | Path:
    from cluster import bundled_model
    from cluster.config import BUNDLED_MODEL

    return bundled_model.path() if source == BUNDLED_MODEL else source


def _bytes_bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)
