"""Prefill: prompt tokens a second until the first token, over the public API with the whole system up."""

from collections.abc import Callable, Iterator

from attention.micro_batch import MAX_MICRO_BATCHES, NUM_TRIALS
from tests.bench.load_client import LoadClient
from tests.bench.measured_model import MeasuredModel, measured_models
from tests.bench.peers.peer import RunningPeer
from tests.bench.probe import Reading
from tests.bench.row import Options, Row, Unmeasurable
from tests.bench.turns import Cell, measure_in_turn

NAME = "prefill"
NUM_TOKENS = (512, 2048, 8192)
MAX_PEER_TOKENS = 2048
NUM_WARM_UPS = MAX_MICRO_BATCHES * NUM_TRIALS  # until the number of micro-batches is chosen by what was measured


def rows(options: Options) -> Iterator[Row]:
    """By model, format and length of the prompt."""
    for model in measured_models(options, options.formats):
        if not isinstance(model, MeasuredModel):
            name, kind, why = model
            yield Row.missing(NAME, {"model": name, "format": kind}, why)
            continue
        try:
            with model.served(options) as (_, client):
                lengths = [length for length in NUM_TOKENS if length < client.max_model_len]
                lengths = lengths[:1] if options.is_quick else lengths
                for length in lengths:
                    for seed in range(NUM_WARM_UPS):
                        client.prefill(length, -1 - seed)
                cells = [_cell(model, client, length) for length in lengths]
                yield from measure_in_turn(cells, model, options)
        except Unmeasurable as error:
            yield Row.missing(NAME, model.params, str(error))


def _cell(model: MeasuredModel, client: LoadClient, num_tokens: int) -> Cell:
    def ours(seed: int) -> tuple[float, Callable[[Reading], float]]:
        rate = num_tokens / client.prefill(num_tokens, seed)

        def limit(reading: Reading) -> float:
            return model.shape.prefill_rate(num_tokens, model.kind, reading.operations_per_s, reading.bytes_per_s)

        return rate, limit

    def theirs(peer: RunningPeer, seed: int) -> float:
        return peer.prefill(num_tokens, seed)

    params = model.params | {"tokens": num_tokens}
    return Cell(name=NAME, params=params, ours=ours, theirs=theirs if num_tokens <= MAX_PEER_TOKENS else None)
