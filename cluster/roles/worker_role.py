"""An attention worker's process: engine, decoder, router and inference server, assembled."""

import logging
from collections.abc import Mapping
from dataclasses import replace

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from attention.decoder import Decoder, DecoderWeights
from attention.engine import Engine, EngineStats
from attention.latent_cache import LatentCache
from attention.layer_sampler import LayerSampler
from attention.metrics import EngineMetrics
from attention.model_runner import ModelRunner
from attention.request import GenerationDefaults, RequestReader
from attention.servicer import SERVICE, InferenceServicer
from attention.tokenizer import Tokenizer
from attention.worker_report import WorkerReport
from cluster.checkpoint.model_shapes import model_shape
from cluster.config import ActorConfig, MobulaConfig
from cluster.controller.process import ProcessHealth, Quarantine
from cluster.controller.worker_usage import WorkerWork
from cluster.roles.compute_threads import compute_with, share_of_cores
from cluster.roles.preflight import ServedModel, cache_config, open_model
from cluster.roles.role import CONTROL_TIMEOUT_S, Role
from cluster.roles.thread_watch import ThreadWatch
from cluster.roles.vllm_names import VllmNames
from cluster.version import VERSION
from protos import generation_pb2, rpc
from protos.codec import dtype_to_wire
from protos.credentials import PeerRole
from protos.errors import InvalidRequest, Unavailable
from protos.poller import Poller
from router.expert_map import ExpertMap
from router.metrics import RouterMetrics
from router.overload_valve import OverloadValve
from router.ring_transport import connect_to
from router.router import Router
from router.trace.choice_sampler import ChoiceSampler
from router.trace.header_json import header_to_json
from router.trace.model_shape import ModelShape
from router.trace.trace import ExpertIds, TraceHeader, id_dtype

logger = logging.getLogger(__name__)


class WorkerRole(Role):
    """An attention worker: engine, router and inference server."""

    def __init__(self, config: MobulaConfig, dp_rank: int, host: str | None) -> None:
        super().__init__(config, PeerRole.WORKER, dp_rank, host)
        self._dp_rank = dp_rank
        self._router: Router | None = None
        self._report: WorkerReport | None = None
        self._engine: Engine | None = None
        self._server: grpc.aio.Server | None = None
        self._health_servicer = health_aio.HealthServicer()
        self._sampler: tuple[ChoiceSampler, ModelShape] | None = None
        self._is_stopping = False

    @property
    def placement_version(self) -> int | None:
        return self._router.expert_map.placement_version if self._router else None

    def _load(self, expert_map: ExpertMap) -> tuple[str, int]:
        workers = self._config.attention_workers
        compute_with(workers.num_threads or share_of_cores(workers.count))
        model = open_model(self._config)
        decoder_config = model.config.decoder
        model.checkpoint.check_role(decoder_config.weight_shapes())
        weights = DecoderWeights.read(model.checkpoint, decoder_config, model.dtype, workers.device)
        poller = Poller()
        router_metrics = RouterMetrics(self._registry, self._dp_rank)
        if self._config.metrics.vllm_names:
            VllmNames(self._registry, model.model_id)
        valve = OverloadValve.wanted(workers.router, decoder_config.gate, router_metrics.count_dropped)
        if valve is not None:
            logger.warning(
                "capacity_policy is %s: under load answers lack experts and depend on what else is in a step",
                workers.router.capacity_policy.value,
            )
        router = Router(
            config=workers.router,
            gate=decoder_config.gate,
            expert_map=expert_map,
            addresses={},
            connect=connect_to(self._loop.loop, poller, workers.router.shared_memory_mib, self._credentials),
            metrics=router_metrics,
            poller=poller,
        )
        shape = model_shape(model.model_id, model.config, model.dtype.itemsize)
        sampler = ChoiceSampler(router, shape)
        self._sampler = None if valve else (sampler, shape)
        layers = LayerSampler(sampler) if self._config.tracing.endpoint else None
        cache = LatentCache(cache_config(self._config, model))
        runner = ModelRunner(
            Decoder(
                decoder_config,
                weights,
                layers or sampler,
                cache,
                mla_form=workers.mla_form,
                num_micro_batches=workers.num_micro_batches,
                valve=valve,
                begin_step=sampler.begin_step,
            ),
            block_size=workers.engine.block_size,
            device=workers.device,
        )
        num_blocks = cache.config.num_blocks
        max_model_len = workers.engine.resolved_max_model_len(num_blocks, decoder_config.max_position_embeddings)
        metrics = EngineMetrics(self._registry, self._dp_rank)
        engine = Engine(
            workers.engine,
            runner,
            num_blocks=num_blocks,
            metrics=metrics,
            limit_step=router.limit_step,
            poller=poller,
        )
        folder = model.tokenizer_folder()
        tokenizer = Tokenizer.read(folder, decoder_config.vocab_size)
        reader = RequestReader(
            tokenizer,
            defaults=GenerationDefaults.read(folder),
            vocab_size=decoder_config.vocab_size,
            max_model_len=max_model_len,
        )
        info = _model_info(self._config, model, max_model_len, num_blocks, tokenizer)
        report = WorkerReport(router, decoder_config.gate, info, self._credentials)
        engine.start()
        self._watch = ThreadWatch("engine", engine)
        self._router, self._report, self._engine = router, report, engine
        port = self._loop.run(self._serve(InferenceServicer(engine, reader, report, metrics, self._tracing, layers)))
        self._serve_health(self._health_servicer)
        return f"{self._host}:{port}", weights.weight_bytes

    def update_placement(self, expert_map: ExpertMap, addresses: Mapping[int, str]) -> None:
        """Where the experts are now. Returns once every shard is connected or has had its time."""
        assert self._router
        assert self._report
        self._router.update_placement(expert_map, addresses)
        self._loop.run(self._report.update_shards(addresses), CONTROL_TIMEOUT_S)
        down = self._router.wait_until_connected(timeout_s=2.0)
        if down:
            logger.warning("no connection to shards %s yet", down)
        self._loop.run(self._set_serving(True), CONTROL_TIMEOUT_S)

    def oldest_placement_version(self) -> int:
        """Under which a forward is under way; without any, the newest that was told."""
        assert self._router
        return self._router.oldest_placement_version

    def health(self) -> ProcessHealth:
        """As every process; a worker whose engine thread has ended by itself ends too, and Ray starts it again."""
        if self._engine and not self._engine.is_alive and not self._is_stopping:
            self._end_process("the engine thread has ended")
        router = self._router
        if router is None:
            return super().health()
        return replace(
            super().health(),
            placement_version=router.expert_map.placement_version,
            oldest_placement_version=router.oldest_placement_version,
            quarantines=(
                *(Quarantine(ep_rank, None, None, "answers are late") for ep_rank in router.quarantined_shards()),
                *(Quarantine(*unit) for unit in router.quarantined_units()),
            ),
        )

    def expert_map(self) -> ExpertMap:
        """The newest that was told."""
        assert self._router
        return self._router.expert_map

    def sample_choices(self, max_bytes: int) -> tuple[bytes, ExpertIds]:
        """A trace's header as JSON, and which experts tokens chose since this was asked last, at most max_bytes.

        Raises InvalidRequest where the overload valve leaves choices out.
        """
        if self._sampler is None:
            raise InvalidRequest(
                "with an overload valve some tokens' choices are left out: a trace needs capacity_policy dropless"
            )
        sampler, shape = self._sampler
        token_bytes = shape.num_moe_layers * shape.top_k * id_dtype(shape.gate.n_routed_experts).itemsize
        return header_to_json(TraceHeader(model=shape, source=shape.name)), sampler.take(max_bytes // token_bytes)

    def work(self) -> WorkerWork:
        """What it is doing now."""
        assert self._engine
        stats = self._engine.stats
        places_ratio = stats.num_running / self._config.attention_workers.engine.max_num_seqs
        return WorkerWork(max(stats.cache_usage_ratio, places_ratio), stats.num_running, stats.num_waiting)

    def engine_stats(self) -> EngineStats:
        """What the engine was doing after its latest step."""
        assert self._engine
        return self._engine.stats

    def _stop(self, drain_timeout_s: float) -> None:
        if not (self._engine and self._router and self._report and self._server):
            return
        self._is_stopping = True
        self._loop.run(self._set_serving(False), CONTROL_TIMEOUT_S)
        self._engine.stop(drain_timeout_s)
        self._loop.run(self._server.stop(grace=1.0))
        self._loop.run(self._report.close(), CONTROL_TIMEOUT_S)
        self._router.close()

    async def _serve(self, servicer: InferenceServicer) -> int:
        server = self._credentials.server((PeerRole.GATEWAY,), rpc.relay_options())
        server.add_generic_rpc_handlers(servicer.handlers())
        health_pb2_grpc.add_HealthServicer_to_server(self._health_servicer, server)
        names = (SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        wanted = self._config.attention_workers.port
        try:
            port = self._credentials.listen(server, f"{self._host}:{wanted}")
        except RuntimeError as error:
            raise Unavailable(
                f"cannot listen on {self._host}:{wanted}: the port is taken or the address is not of this machine; "
                "set attention_workers.port"
            ) from error
        await server.start()
        await self._set_serving(False)
        self._server = server
        return port

    async def _set_serving(self, is_serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        for name in ("", SERVICE):
            await self._health_servicer.set(name, status.SERVING if is_serving else status.NOT_SERVING)

    def _ports(self) -> ActorConfig:
        return self._config.attention_workers


def _model_info(
    config: MobulaConfig, model: ServedModel, max_model_len: int, num_blocks: int, tokenizer: Tokenizer
) -> generation_pb2.GetModelInfoResponse:
    decoder = model.config.decoder
    return generation_pb2.GetModelInfoResponse(
        model_id=model.model_id,
        model_type=model.config.model_type,
        dtype=dtype_to_wire(model.dtype),
        vocab_size=decoder.vocab_size,
        max_model_len=max_model_len,
        num_hidden_layers=decoder.num_hidden_layers,
        hidden_size=decoder.hidden_size,
        moe_layer_ids=decoder.moe_layer_ids,
        n_routed_experts=decoder.gate.n_routed_experts,
        n_shared_experts=decoder.n_shared_experts,
        num_experts_per_tok=decoder.gate.num_experts_per_tok,
        n_group=decoder.gate.n_group,
        topk_group=decoder.gate.topk_group,
        eos_token_ids=sorted(tokenizer.eos_token_ids),
        has_chat_template=tokenizer.has_chat_template,
        dp_size=config.attention_workers.count,
        version=VERSION,
        max_num_seqs=config.attention_workers.engine.max_num_seqs,
        num_cache_tokens=num_blocks * config.attention_workers.engine.block_size,
    )
