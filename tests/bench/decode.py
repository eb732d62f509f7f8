"""Decode: tokens a second of 1 to 128 sequences, over the public API with the whole system up.

Steady state: counted only while every sequence is decoding. Then what it costs that experts are separate processes.
"""

from collections.abc import Callable, Iterator
from typing import Any

from tests.bench.limits import counted_distinct
from tests.bench.load_client import LoadClient
from tests.bench.measured_model import MeasuredModel, measured_models
from tests.bench.peers.peer import RunningPeer
from tests.bench.probe import Probe, Reading
from tests.bench.row import Options, Row, Unmeasurable
from tests.bench.turns import Cell, measure_in_turn

NAME = "decode"
CELLS = ((1, 128, 48), (8, 128, 40), (32, 128, 32), (128, 32, 24))  # batch, prompt tokens, steps
MAX_PEER_BATCH = 32
NUM_SHARDS = 2
VARIANT_BATCH, VARIANT_CONTEXT, VARIANT_STEPS = 8, 128, 48


def rows(options: Options) -> Iterator[Row]:
    """By model and format: the batches; for the first format of a model, the variants of the system too."""
    seen = set()
    for model in measured_models(options, options.formats):
        if not isinstance(model, MeasuredModel):
            name, kind, why = model
            yield Row.missing(NAME, {"model": name, "format": kind}, why)
            continue
        try:
            with model.served(options, num_shards=NUM_SHARDS) as (_, client):
                yield from measure_in_turn(_cells(model, client, options), model, options)
                if model.name not in seen and not options.is_quick:
                    yield from _variants(model, client, options)
                seen.add(model.name)
        except Unmeasurable as error:
            yield Row.missing(NAME, model.params, str(error))


def _cells(model: MeasuredModel, client: LoadClient, options: Options) -> list[Cell]:
    cells = CELLS[:2] if options.is_quick else CELLS
    return [_cell(model, client, *cell) for cell in cells]


def _cell(model: MeasuredModel, client: LoadClient, batch: int, context: int, num_steps: int) -> Cell:
    def ours(seed: int) -> tuple[float, Callable[[Reading], float]]:
        run = client.decode(batch, context, num_steps, seed)
        distinct = counted_distinct(run.choices, model.shape.num_experts, model.shape.top_k, batch)
        middle = context + num_steps / 2

        def limit(reading: Reading) -> float:
            return model.shape.decode_rate(
                batch, middle, distinct, model.kind, reading.bytes_per_s, reading.operations_per_s
            )

        return run.tokens_per_s, limit

    def theirs(peer: RunningPeer, seed: int) -> float:
        return peer.decode(batch, context, num_steps, seed)

    params = model.params | {"batch": batch, "context": context, "shards": NUM_SHARDS}
    return Cell(name=NAME, params=params, ours=ours, theirs=theirs if batch <= MAX_PEER_BATCH else None)


def _variants(model: MeasuredModel, client: LoadClient, options: Options) -> Iterator[Row]:
    """The system with two shards, running, against others of the same code in turn."""
    two = f"{NUM_SHARDS} shards"
    variants: tuple[tuple[str, str, bool, dict[str, Any]], ...] = (
        (two, "one process", False, {"in_one_process": True, "num_shards": 1}),
        (two, "1 shard", False, {"num_shards": 1}),
        ("4 shards", two, True, {"num_shards": 4}),
    )
    for what, against, is_inverse, settings in variants:
        params = model.params | {"batch": VARIANT_BATCH, "this": what, "against": against}
        try:
            options.check_time(60.0)
            with model.served(options, **settings) as (_, other):
                options.show(f"{model.name} {model.kind}: {what} against {against}")
                ratios, probe = [], Probe(options.num_threads, model.kind)
                _rate(other, 0)
                for repeat in range(options.num_repeats):
                    probe.look()
                    ratio = _rate(client, 1 + repeat) / _rate(other, 1 + repeat)
                    ratios.append(1 / ratio if is_inverse else ratio)
            yield Row.of("decode, share kept", params | dict(probe.params()), ratios, "x")
        except Unmeasurable as error:
            yield Row.missing("decode, share kept", params, str(error))


def _rate(client: LoadClient, seed: int) -> float:
    run = client.decode(VARIANT_BATCH, VARIANT_CONTEXT, VARIANT_STEPS, seed, counts_experts=False)
    return run.tokens_per_s
