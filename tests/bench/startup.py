"""Start-up: seconds from the command to its word that it serves, the checkpoint being in the page cache."""

from collections.abc import Iterator

from tests.bench.measured_model import MeasuredModel, measured_models
from tests.bench.peers.peer import RunningPeer
from tests.bench.probe import Probe
from tests.bench.row import Options, Row, Unmeasurable

NAME = "startup"


def rows(options: Options) -> Iterator[Row]:
    """By model and format. A peer starts once: from its start until it can answer."""
    for model in measured_models(options, options.formats[:1]):
        if not isinstance(model, MeasuredModel):
            name, kind, why = model
            yield Row.missing(NAME, {"model": name, "format": kind}, why)
            continue
        try:
            yield from _model_rows(model, options)
        except Unmeasurable as error:
            yield Row.missing(NAME, model.params, str(error))


def _model_rows(model: MeasuredModel, options: Options) -> Iterator[Row]:
    probe, samples = Probe(options.num_threads, model.kind), []
    turns: dict[str, list[tuple[float, float]]] = {}
    model.read_into_page_cache()
    for _ in range(options.num_repeats - 1):
        options.check_time(20.0)
        probe.look()
        with model.served(options) as (system, _):
            samples.append(system.start_s)
    for peer in model.peers(options):
        options.show(f"{model.name} {model.kind}: starting {peer.name}")
        try:
            options.check_time(20.0)
            with RunningPeer(peer, model.folder, model.kind, options) as running:
                turns[peer.name] = [(samples[-1], running.start_s)]
        except Unmeasurable as error:
            yield Row.missing(NAME, model.params | {"peer": peer.name}, str(error))
    yield Row.of(NAME, model.params | dict(probe.params()), samples, "s", turns=turns)
