"""The overload valve in a whole worker: engine, decoder, router and shards. What it drops is counted, and only that."""

import asyncio
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry
from torch import Tensor

from attention.decoder import Decoder, DecoderWeights
from attention.engine import Engine
from attention.engine_config import EngineConfig
from attention.latent_cache import LatentCache
from attention.metrics import EngineMetrics
from attention.model_runner import ModelRunner
from attention.request import GenerationDefaults, RequestReader
from attention.sampler import SampledToken
from attention.scheduler import ScheduledBatch
from attention.servicer import InferenceServicer
from cluster.checkpoint.checkpoint import Checkpoint
from cluster.config import parse_config
from cluster.roles.single_process import SingleProcess
from protos.generation_pb2 import GenerateRequest, GenerateResponse, SamplingParams, TokenIds
from router.local_transport import LocalTransport
from router.metrics import RouterMetrics
from router.overload_valve import OverloadValve
from router.router import Router
from router.router_config import CapacityPolicy, RouterConfig
from tests.attention.fake_decoder import make_byte_tokenizer
from tests.attention.steps import BLOCK_SIZE, cache_config, random_token_ids
from tests.checkpoints import VOCAB_SIZE, write_checkpoint
from tests.integration.test_same_bits import Shards, placement
from tests.integration.test_worker_service import FakeClusterInfo
from tests.router.test_overload_valve import POLICIES, naive_kept

PROMPTS = [random_token_ids(n, seed=n) for n in (3, 40, 25, 9)]
NUM_NEW_TOKENS = 6
NUM_MICRO_BATCHES = 2
FACTOR, MINIMUM = 0.5, 2


class RecordingValve(OverloadValve):
    """Remembers what the gate chose."""

    calls: list[tuple[Tensor, Tensor]]

    def limit(self, topk_ids: Tensor, logits: Tensor) -> Tensor:
        self.calls.append((topk_ids.clone(), logits.clone()))
        return super().limit(topk_ids, logits)


class RecountingRunner:
    """After each step drops once more, in a loop, and adds to each request what its rows lack."""

    def __init__(self, runner: ModelRunner, valve: RecordingValve, policy: CapacityPolicy, decoder: Decoder) -> None:
        self._runner = runner
        self._valve = valve
        self._policy = policy
        self._gate = decoder.config.gate
        self._num_layers = len(decoder.config.moe_layer_ids)
        self.num_dropped: dict[str, int] = {}

    def run(self, batch: ScheduledBatch, on_begun: Callable[[], None]) -> list[SampledToken | None]:
        self._valve.calls = []
        sampled = self._runner.run(batch, on_begun)
        for rows, (ids, logits) in zip(self._rows_of_calls(batch), self._valve.calls, strict=True):
            kept = naive_kept(self._policy, self._gate, ids, logits, FACTOR, MINIMUM)
            for i, owner in enumerate(rows):
                missing = ids.shape[1] - sum(token == i for token, _ in kept)
                self.num_dropped[owner] = self.num_dropped.get(owner, 0) + missing
        return sampled

    def _rows_of_calls(self, batch: ScheduledBatch) -> list[list[str]]:
        """The request of each row that the gate chose for, in each call; in the last layer's, of those sampled."""
        owners = [row.sequence.request_id for row in batch.sequences for _ in range(row.num_scheduled_tokens)]
        ends = itertools.accumulate(row.num_scheduled_tokens for row in batch.sequences)
        last = [end - 1 for row, end in zip(batch.sequences, ends, strict=True) if row.needs_sample]
        middle = len(owners) // NUM_MICRO_BATCHES
        parts = [range(middle), range(middle, len(owners))] if middle else [range(len(owners))]
        every = [[owners[row] for row in part] for part in parts]
        wanted = [[owners[row] for row in last if row in part] for part in parts]
        return every * (self._num_layers - 1) + [part for part in wanted if part]


class FakeContext:
    def add_done_callback(self, callback: object) -> None:
        """The call is never cancelled."""

    def time_remaining(self) -> None:
        """It has no deadline."""

    def invocation_metadata(self) -> tuple[()]:
        """It is not traced."""
        return ()


class Worker:
    """One worker over three shards, with the service but not its socket."""

    def __init__(self, folder: Path, shards: Shards, policy: CapacityPolicy) -> None:
        checkpoint, decoder_config = Checkpoint.open(folder), shards.decoder_config
        self.registry = CollectorRegistry()
        config = RouterConfig(capacity_policy=policy, capacity_factor=FACTOR, min_capacity=MINIMUM)
        metrics = RouterMetrics(self.registry, dp_rank=0)
        self.router = Router(
            config=config,
            gate=decoder_config.gate,
            expert_map=shards.expert_map,
            addresses={rank: str(rank) for rank in range(len(shards.shards))},
            connect=lambda address: LocalTransport(shards.shards[int(address)].forward, address),
            metrics=metrics,
        )
        valve = RecordingValve.wanted(config, decoder_config.gate, metrics.count_dropped)
        decoder = Decoder(
            decoder_config,
            DecoderWeights.read(checkpoint, decoder_config, torch.float32),
            self.router,
            LatentCache(cache_config(decoder_config, num_blocks=64, dtype=torch.float32)),
            num_micro_batches=NUM_MICRO_BATCHES,
            valve=valve,
        )
        runner = ModelRunner(decoder, block_size=BLOCK_SIZE)
        self.recount = RecountingRunner(runner, valve, policy, decoder) if isinstance(valve, RecordingValve) else None
        engine_metrics = EngineMetrics(self.registry, dp_rank=0)
        self.engine = Engine(
            EngineConfig(block_size=BLOCK_SIZE, max_num_seqs=4, max_num_batched_tokens=32),
            self.recount or runner,
            num_blocks=64,
            metrics=engine_metrics,
        )
        reader = RequestReader(
            make_byte_tokenizer(),
            defaults=GenerationDefaults(temperature=0.0),
            vocab_size=VOCAB_SIZE,
            max_model_len=1024,
        )
        self.servicer = InferenceServicer(self.engine, reader, FakeClusterInfo(), engine_metrics)

    def generate_all(self) -> list[list[GenerateResponse]]:
        """Every prompt at once."""

        async def answer(name: str, prompt: list[int]) -> list[GenerateResponse]:
            request = GenerateRequest(
                request_id=name,
                token_ids=TokenIds(ids=prompt),
                sampling_params=SamplingParams(max_tokens=NUM_NEW_TOKENS, ignore_eos=True),
            )
            answers = self.servicer.generate(request.SerializeToString(), FakeContext())
            return [GenerateResponse.FromString(message) async for message in answers]

        async def answers() -> list[list[GenerateResponse]]:
            return await asyncio.gather(*(answer(f"r{i}", prompt) for i, prompt in enumerate(PROMPTS)))

        return asyncio.run(answers())


@contextmanager
def running_worker(folder: Path, policy: CapacityPolicy) -> Iterator[Worker]:
    shards = Shards(Checkpoint.open(folder), placement(folder, 3), torch.float32)
    worker = Worker(folder, shards, policy)
    worker.engine.start()
    try:
        yield worker
    finally:
        worker.engine.stop()
        worker.router.close()
        for shard in shards.shards:
            shard.stop()


@pytest.fixture(scope="module", params=["v2", "v3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), request.param, seed=2)


@pytest.mark.parametrize("policy", POLICIES)
def test_metrics_and_responses_say_what_a_recount_says(folder: Path, policy: CapacityPolicy) -> None:
    with running_worker(folder, policy) as worker:
        answers = worker.generate_all()
        counter = worker.registry.get_sample_value("mobula_dropped_assignments_total", {"dp_rank": "0"})
        stats = worker.router.stats()
    assert all(len(answer) == NUM_NEW_TOKENS for answer in answers)
    reported = {answer[-1].request_id: answer[-1].usage.num_dropped_assignments for answer in answers}
    assert worker.recount is not None
    assert reported == worker.recount.num_dropped
    assert counter == stats.num_dropped_assignments == sum(reported.values()) > 0
    told = [message.usage for answer in answers for message in answer[:-1] if message.HasField("usage")]
    assert all(usage.num_dropped_assignments for usage in told), "before the end only what is lacking is told"


def test_without_a_policy_there_is_no_valve_and_nothing_is_dropped(folder: Path) -> None:
    with running_worker(folder, CapacityPolicy.DROPLESS) as worker:
        answers = worker.generate_all()
        assert worker.registry.get_sample_value("mobula_dropped_assignments_total", {"dp_rank": "0"}) == 0
        assert worker.recount is None
    assert [answer[-1].usage.num_dropped_assignments for answer in answers] == [0] * len(PROMPTS)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_capacity_that_is_never_reached_changes_no_bit_and_a_tight_one_does(
    folder: Path, policy: CapacityPolicy
) -> None:
    token_ids = random_token_ids(60, seed=1)

    def logits(**router: object) -> Tensor:
        engine = {"max_num_seqs": 1, "cache_gib": 0.01}
        workers = {"engine": engine, "router": router}
        settings = {"model": str(folder), "attention_workers": workers, "expert_shards": {"count": 2}}
        with SingleProcess(parse_config(settings)) as process:
            return process.logits(token_ids)

    dropless = logits()
    assert torch.equal(logits(capacity_policy="dropless", capacity_factor=0.01), dropless)
    assert torch.equal(logits(capacity_policy=policy.value, capacity_factor=1024.0), dropless)
    tight = logits(capacity_policy=policy.value, capacity_factor=0.25)
    assert tight.isfinite().all()
    assert not torch.equal(tight, dropless)
