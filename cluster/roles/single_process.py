"""A worker's decoder and its expert shards in one process, without Ray, network and scheduler.

The same parts as in a served system, so its logits are the served model's. For comparing checkpoints, and for measuring
what separate processes cost.
"""

from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Self

import torch
from prometheus_client import CollectorRegistry
from torch import Tensor

from attention.decoder import Decoder, DecoderWeights, ExpertDispatcher
from attention.latent_cache import LatentCache
from attention.model_runner import attention_metadata
from attention.sampler import SampleRow, sample
from attention.sampling_params import SamplingParams
from attention.scheduler import ScheduledBatch, ScheduledSequence
from attention.sequence import Sequence as TokenSequence
from cluster.config import MobulaConfig
from cluster.roles.compute_threads import compute_with, share_of_cores
from cluster.roles.preflight import ServingPlan, cache_config, check
from experts.metrics import ShardMetrics
from experts.shard import ExpertShard, ShardConfig
from experts.weight_store import Unit
from router.local_transport import LocalTransport
from router.metrics import RouterMetrics
from router.overload_valve import OverloadValve
from router.router import Router

CONNECT_TIMEOUT_S = 10.0  # in one process a connection is there or never will be


class SequenceTooLong(ValueError):
    """More tokens than the model or the cache can hold."""


class SingleProcess:
    """Not thread-safe. Leaving the block stops the shards' threads."""

    def __init__(
        self,
        config: MobulaConfig,
        wrap_dispatcher: Callable[[ExpertDispatcher], ExpertDispatcher] = lambda dispatcher: dispatcher,
    ) -> None:
        """Reads all weights: `expert_shards.count` shards, one worker whatever `attention_workers.count` is.

        wrap_dispatcher: what stands between decoder and router, to see what passes.
        Raises what cluster.roles.preflight.check raises.
        """
        self.plan: ServingPlan = check(config)
        workers = config.attention_workers
        compute_with(workers.num_threads or share_of_cores(1))
        model, expert_map = self.plan.model, self.plan.expert_map
        decoder_config = model.config.decoder
        registry = CollectorRegistry()
        self._shards = []
        for ep_rank in range(expert_map.ep_size):
            shard_config = ShardConfig(ep_rank=ep_rank, max_waiting_forwards=config.expert_shards.max_waiting_forwards)
            metrics = ShardMetrics(CollectorRegistry(), ep_rank)
            self._shards.append(ExpertShard(shard_config, model.expert_model, model.checkpoint, metrics))
        for ep_rank, shard in enumerate(self._shards):
            shard.activate(expert_map.placement_version, [Unit(*unit) for unit in expert_map.units_of(ep_rank)])
        weights = DecoderWeights.read(model.checkpoint, decoder_config, model.dtype, workers.device)
        for shard in self._shards:
            shard.start()
        router_metrics = RouterMetrics(registry, dp_rank=0)
        self._router = Router(
            config=workers.router,
            gate=decoder_config.gate,
            expert_map=expert_map,
            addresses={ep_rank: str(ep_rank) for ep_rank in range(expert_map.ep_size)},
            connect=lambda address: LocalTransport(self._shards[int(address)].forward, address),
            metrics=router_metrics,
        )
        assert self._router.wait_until_connected(CONNECT_TIMEOUT_S) == [], "nothing lies between router and shards"
        cache = LatentCache(cache_config(config, model))
        valve = OverloadValve.wanted(workers.router, decoder_config.gate, router_metrics.count_dropped)
        self._decoder = Decoder(
            decoder_config, weights, wrap_dispatcher(self._router), cache, mla_form=workers.mla_form, valve=valve
        )
        self._engine = workers.engine
        self._device = torch.device(workers.device)

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """What the model expects after each token: [num_tokens, vocab_size] fp32. Computed in chunks, as a prompt is.

        Raises SequenceTooLong.
        """
        return self._logits(token_ids, start=0, num_prompt_tokens=len(token_ids))

    def generate(self, prompt_token_ids: Sequence[int], num_tokens: int, params: SamplingParams) -> Iterator[int]:
        """Samples so many tokens after a prompt, past any end token. Raises SequenceTooLong."""
        token_ids = list(prompt_token_ids)
        num_computed = 0
        for position in range(num_tokens):
            logits = self._logits(token_ids, start=num_computed, num_prompt_tokens=len(prompt_token_ids))[-1:]
            num_computed = len(token_ids)
            token_ids.append(sample(logits, [SampleRow(sampling_params=params, output_position=position)])[0].token_id)
            yield token_ids[-1]

    @torch.inference_mode()
    def _logits(self, token_ids: Sequence[int], start: int, num_prompt_tokens: int) -> Tensor:
        """Of the tokens from `start` on, those before being in the cache: [num_tokens - start, vocab_size] fp32."""
        num_tokens = len(token_ids)
        if num_tokens > self.plan.max_model_len:
            raise SequenceTooLong(f"the text has {num_tokens} tokens, limit is {self._limit()}")
        sequence = TokenSequence(
            request_id="logits",
            prompt_token_ids=list(token_ids[:num_prompt_tokens]),
            sampling_params=SamplingParams(seed=0, max_tokens=1),
            max_num_tokens=num_tokens + 1,
        )
        block_table = tuple(range(-(-num_tokens // self._engine.block_size)))
        parts = []
        for first in range(start, num_tokens, self._engine.max_num_batched_tokens):
            count = min(self._engine.max_num_batched_tokens, num_tokens - first)
            sequence.num_computed_tokens = first
            scheduled = ScheduledSequence(sequence=sequence, num_scheduled_tokens=count, block_table=block_table)
            metadata = attention_metadata(ScheduledBatch(sequences=(scheduled,)), self._engine.block_size, self._device)
            step = torch.tensor(token_ids[first : first + count], device=self._device)
            parts.append(self._decoder.logits(self._decoder.forward(step, metadata)))
        return torch.cat(parts)

    def _limit(self) -> str:
        """The limit that binds a text's length, and the way out."""
        length = self.plan.max_model_len
        if length == self.plan.model.config.decoder.max_position_embeddings:
            return f"{length}, the model's max_position_embeddings; shorten it"
        if self._engine.max_model_len is not None:
            setting = "attention_workers.engine.max_model_len"
        else:
            cache = "cache_gib" if self._engine.num_blocks is None else "num_blocks"
            setting = f"what attention_workers.engine.{cache} holds"
        return f"{length}, {setting}; shorten it or raise that"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the shards' threads."""
        self._router.close()
        for shard in self._shards:
            shard.stop()
