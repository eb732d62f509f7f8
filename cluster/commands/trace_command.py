"""`mobula trace`: records which experts tokens choose, and replays that under any placement without a cluster.

Loads torch only to record, or to read a config.json.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import grpc
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from cluster.commands.arguments import some_address
from cluster.commands.terminal import console, errors, fail, fail_call
from cluster.commands.trace_views import (
    VIEW_WIDTH,
    CannotPlot,
    check_plot,
    plot_replay,
    replay_json,
    replay_view,
    size_of,
)
from router.placement import POLICIES
from router.trace.cost_model import CostModel
from router.trace.model_shape import PUBLISHED, ModelShape
from router.trace.replay import ReplayCase, ReplayResult, ReplaySettings, replay
from router.trace.synthetic import Skew, SyntheticTrace
from router.trace.trace import Trace, TraceError
from router.trace.trace_file import TraceFile

if TYPE_CHECKING:
    from cluster.commands.trace_requests import Recording

app = typer.Typer(no_args_is_help=True, help="Record which experts tokens choose; replay it under other placements.")

ALL = "all"
DEFAULT_MODEL, DEFAULT_SEED, DEFAULT_TOKENS = "v2", 0, 16384
MAX_CASES = 1024
RECORDED_TOKENS = 8192
COSTS = CostModel()
SETTINGS = ReplaySettings()


@app.command()
def record(
    out: Annotated[Path, typer.Option(dir_okay=False, help="File to write, .npz.")],
    tokens: Annotated[
        int | None, typer.Option(min=2, help="How many at most; unset: 8192, or no limit by --seconds.")
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="How long at most.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; give several times.")] = None,
    text: Annotated[
        list[Path] | None, typer.Option(exists=True, dir_okay=False, help="UTF-8 file to read; give several times.")
    ] = None,
    model: Annotated[str, typer.Option(help='Folder, Hugging Face id, or "bundled".')] = "bundled",
    address: Annotated[
        str | None,
        typer.Option(
            callback=some_address, help="Gateway of a running system: sample its traffic instead of running a model."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of texts and of continuations.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a file at OUT.")] = False,
) -> None:
    """Write down each token's experts in every layer: of a model that this process runs, or of a running system.

    Without --prompt and --text it reads the four kinds of text that the bundled model knows, in turn.
    """
    if seconds is not None and not 0 < seconds < float("inf"):
        fail(f"--seconds is {seconds}, must be more than 0")
    if prompt and text:
        fail("--prompt and --text are given: a trace has prompts that are continued or texts that are read, not both")
    if address and (prompt or text or model != "bundled"):
        fail("--address is given: a running system has a model and prompts of its own; leave --prompt, --text, --model")
    if out.exists() and not force:
        fail(f"{out} exists; name another file or give --force")
    max_tokens = tokens or (RECORDED_TOKENS if seconds is None else 2**40)
    with _progress() as bar:
        task = bar.add_task("", total=tokens or (RECORDED_TOKENS if seconds is None else None))

        def on_progress(stage: str, count: int) -> None:
            bar.update(task, description=stage, completed=count)

        if address:
            recording = _sampled(address, out, max_tokens, seconds, on_progress)
        else:
            recording = _recorded(out, max_tokens, seconds, prompt, text, model, seed, on_progress)
    kinds = ", ".join(f"{label} {count:,}" for label, count in recording.num_tokens_by_label.items())
    end = "interrupted after" if recording.was_interrupted else "wrote"
    console.print(
        f"[green]{end}[/green] {recording.num_tokens:,} tokens ({escape(kinds)}) in {recording.seconds:.1f} s, "
        f"{recording.num_bytes:,} bytes: {escape(str(out))}",
        highlight=False,
        soft_wrap=True,
    )


def _sampled(
    address: str, out: Path, max_tokens: int, seconds: float | None, on_progress: Callable[[str, int], None]
) -> "Recording":
    """Of a running system."""
    from cluster.client import AdminClient
    from cluster.commands.trace_sampling import sample

    try:
        with AdminClient(address) as client:
            return sample(
                client, out, max_tokens=max_tokens, max_seconds=seconds or float("inf"), on_progress=on_progress
            )
    except grpc.RpcError as error:
        fail_call(error, address)
    except (TraceError, OSError) as error:
        fail(f"nothing is recorded: {error}")


def _recorded(
    out: Path,
    max_tokens: int,
    seconds: float | None,
    prompts: list[str] | None,
    texts: list[Path] | None,
    model: str,
    seed: int,
    on_progress: Callable[[str, int], None],
) -> "Recording":
    """Of a model that runs in this process."""
    from cluster.checkpoint.json_fields import UnsupportedModel
    from cluster.checkpoint.safetensors_file import InvalidCheckpoint
    from cluster.commands.trace_recording import record as run
    from cluster.commands.trace_requests import RecordingConfig
    from cluster.config import ConfigError
    from router.placement import PlacementError

    try:
        config = RecordingConfig(
            model=model,
            max_tokens=max_tokens,
            max_seconds=seconds,
            prompts=tuple(prompts or ()),
            texts={path.name: path.read_text(encoding="utf-8") for path in texts} if texts else None,
            seed=seed,
        )
        return run(config, out, on_progress)
    except (TraceError, ConfigError, InvalidCheckpoint, UnsupportedModel, PlacementError) as error:
        fail(f"nothing is recorded: {error}")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"nothing is recorded: {error}")
    except KeyboardInterrupt:
        fail("interrupted before the first token was recorded")


@app.command(name="replay")
def replay_command(
    file: Annotated[Path | None, typer.Argument(help="A recorded trace; unset: give --synthetic.")] = None,
    synthetic: Annotated[
        str | None, typer.Option(help="Draw traffic instead: zipf:1.1, drift, bursts or correlated.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help=f"Of --synthetic: {', '.join(PUBLISHED)} or a config.json; unset: v2.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of --synthetic; unset: 0.")] = None,
    tokens: Annotated[int | None, typer.Option(min=2, help="Of --synthetic; unset: 16384.")] = None,
    policy: Annotated[list[str] | None, typer.Option(help="Give several times, or all; unset: all.")] = None,
    shards: Annotated[list[int] | None, typer.Option(min=1, help="Give several times; unset: 8.")] = None,
    redundancy: Annotated[
        list[float] | None, typer.Option(help="Extra replicas as a share of all units; give several times; unset: 0.")
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, help="Shards that hold each unit, at least.")] = 1,
    from_static: Annotated[
        bool, typer.Option("--from-static", help="Rebalance the static placement with few moves; else place anew.")
    ] = False,
    step_tokens: Annotated[int, typer.Option(help="Tokens of one dispatch.")] = SETTINGS.step_tokens,
    in_flight: Annotated[int, typer.Option(help="Steps of all workers under way at a time.")] = COSTS.steps_in_flight,
    tflops: Annotated[float, typer.Option(help="Of a shard, for the step time.")] = COSTS.flops_per_s / 1e12,
    message_us: Annotated[float, typer.Option(help="Worker's time for each shard asked.")] = COSTS.message_s * 1e6,
    gigabytes_per_s: Annotated[float, typer.Option(help="Of a worker's link.")] = COSTS.bytes_per_s / 1e9,
    as_json: Annotated[
        bool, typer.Option("--json", help="A list with an object for each policy; notes to stderr.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(dir_okay=False, help="Picture to write, .png or .svg.")] = None,
) -> None:
    """Compare placements on recorded or drawn traffic: balance, shards visited, bytes, memory, expected step time.

    Each policy places by the first half of the trace and is scored on the second.
    """
    try:
        if plot is not None:
            check_plot()
        settings = ReplaySettings(
            step_tokens=step_tokens,
            is_rebalance=from_static,
            cost_model=CostModel(
                flops_per_s=tflops * 1e12,
                message_s=message_us * 1e-6,
                bytes_per_s=gigabytes_per_s * 1e9,
                steps_in_flight=in_flight,
            ),
        )
        cases = _cases(policy or [ALL], shards or [8], redundancy or [0.0], replicas)
        trace = _trace(file, synthetic, model=model, seed=seed, num_tokens=tokens)
        with _progress() as bar:
            task = bar.add_task("", total=100)
            results = replay(
                trace,
                cases,
                settings,
                lambda stage, done: bar.update(task, description=stage, completed=round(done * 100)),
            )
        if plot is not None:
            plot_replay(results, plot)
    except (TraceError, CannotPlot) as error:
        fail(str(error))
    except (OSError, ValueError) as error:  # of writing the picture
        fail(f"{plot}: {error}")
    except KeyboardInterrupt:
        fail("interrupted")
    if as_json:
        rows = [json.dumps(replay_json(result)) for result in results if result.score is not None]
        typer.echo("[\n" + ",\n".join(rows) + "\n]")
    else:
        view = replay_view(trace.header, trace.num_tokens, settings, results)
        Console(width=max(console.width, VIEW_WIDTH)).print(view)
    if _tell_missing(results) == len(results):
        raise typer.Exit(1)


def _tell_missing(results: list[ReplayResult]) -> int:
    """Says which cases have no placement and why, once for those with one reason. Returns how many."""
    sizes: dict[tuple[str, str], list[str]] = {}
    for result in results:
        if result.score is None:
            sizes.setdefault((result.case.policy, result.error), []).append(size_of(result.case))
    for (policy, error), names in sizes.items():
        message = f"[yellow]no placement[/yellow] by {policy} for {', '.join(names)}: {escape(error)}"
        errors.print(message, highlight=False, soft_wrap=True)
    return sum(map(len, sizes.values()))


def _trace(
    file: Path | None, synthetic: str | None, *, model: str | None, seed: int | None, num_tokens: int | None
) -> Trace:
    """Raises TraceError."""
    if (file is None) == (synthetic is None):
        raise TraceError("give either a recorded FILE or --synthetic zipf:1.1 (drift, bursts, correlated)")
    if file is not None:
        for option, value in (("--model", model), ("--seed", seed), ("--tokens", num_tokens)):
            if value is not None:
                raise TraceError(f"{option} is {value}, but the trace has its own: leave it out, or give --synthetic")
        return TraceFile(file)
    return SyntheticTrace(
        _shape(model or DEFAULT_MODEL),
        Skew.parse(synthetic or ""),
        num_tokens=DEFAULT_TOKENS if num_tokens is None else num_tokens,
        seed=DEFAULT_SEED if seed is None else seed,
    )


def _shape(model: str) -> ModelShape:
    if model in PUBLISHED:
        return PUBLISHED[model]
    if not Path(model).exists():
        raise TraceError(f"model is {model!r}, known are {', '.join(PUBLISHED)} and paths of a config.json")
    from cluster.checkpoint.model_shapes import read_model_shape

    return read_model_shape(Path(model))


def _cases(policies: list[str], shards: list[int], redundancies: list[float], replicas: int) -> list[ReplayCase]:
    names = list(dict.fromkeys(name for policy in policies for name in (POLICIES if policy == ALL else [policy])))
    cases = [
        ReplayCase(policy=name, ep_size=ep_size, redundancy=redundancy, num_replicas=replicas)
        for ep_size in dict.fromkeys(shards)
        for redundancy in dict.fromkeys(redundancies)
        for name in names
    ]
    if len(cases) > MAX_CASES:
        raise TraceError(f"{len(cases)} placements are asked for, limit is {MAX_CASES}: give fewer policies or shards")
    return cases


def _progress() -> Progress:
    # no markup: a stage may be the name of a text's file
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal)
