"""How decoding slows as the context grows, for one sequence, against reading the latent cache at the machine's rate."""

from collections.abc import Iterator

from tests.bench.limits import counted_distinct
from tests.bench.load_client import LoadClient
from tests.bench.measured_model import MeasuredModel, measured_models
from tests.bench.probe import Probe
from tests.bench.row import Options, Row, Unmeasurable

NAME = "context"
CONTEXTS = (1024, 4096, 16384, 32768)
NUM_STEPS = 32


def rows(options: Options) -> Iterator[Row]:
    """By model and context, and the growth from the shortest to each longer one."""
    for model in measured_models(options, options.formats[:1]):
        if not isinstance(model, MeasuredModel):
            name, kind, why = model
            yield Row.missing(NAME, {"model": name, "format": kind}, why)
            continue
        try:
            with model.served(options) as (_, client):
                yield from _model_rows(model, client, options)
        except Unmeasurable as error:
            yield Row.missing(NAME, model.params, str(error))


def _model_rows(model: MeasuredModel, client: LoadClient, options: Options) -> Iterator[Row]:
    probe = Probe(options.num_threads, model.kind)
    client.decode(1, 64, 8, 0)
    first_ms, tokens_per_s = None, 0.0
    for context in CONTEXTS[:2] if options.is_quick else CONTEXTS:
        params = model.params | {"batch": 1, "context": context}
        if context + 2 * NUM_STEPS > client.max_model_len:
            continue
        try:
            if tokens_per_s:  # a longer prompt is also slower a token
                options.check_time(2 * context / tokens_per_s)
            options.show(f"{model.name} {model.kind}: decoding at a context of {context}")
            reading = probe.look()
            run = client.decode(1, context, NUM_STEPS, context)
        except Unmeasurable as error:
            yield Row.missing(NAME, params, str(error))
            continue
        tokens_per_s = context / run.streams[0].first_token_s
        milliseconds = 1e3 / run.tokens_per_s
        distinct = counted_distinct(run.choices, model.shape.num_experts, model.shape.top_k, 1)
        read = model.shape.decode_bytes(1, context + NUM_STEPS / 2, distinct, model.kind)
        limit_ms = 1e3 * read / reading.bytes_per_s
        yield Row.of(NAME, params | dict(probe.params()), [milliseconds], "ms", limits=[limit_ms])
        if first_ms is None:
            first_ms = milliseconds
            continue
        growth_ms = milliseconds - first_ms
        cache_ms = 1e3 * (context - CONTEXTS[0]) * model.shape.cache_bytes_per_token() / reading.bytes_per_s
        fraction = cache_ms / growth_ms if growth_ms > 0 else 1.0
        yield Row(
            name="context, growth",
            params=params | {"from": CONTEXTS[0]} | dict(probe.params()),
            value=growth_ms,
            unit="ms",
            limit_fraction=fraction,
        )
