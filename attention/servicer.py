"""The services of one attention worker, Inference and Worker: decode, validate, call, encode.

The event loop owns streams and the engine thread owns sequences; outputs cross over through an asyncio queue for each
request. When a call ends, however it ends, its sequence is aborted, so that its blocks are free within a step.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from typing import Protocol

import grpc
import grpc.aio

from attention.engine import Engine
from attention.layer_sampler import LayerSample, LayerSampler
from attention.metrics import EngineMetrics
from attention.request import RequestReader
from attention.sequence import FinishReason, Sequence, SequenceOutput, TokenLogprobs
from protos import generation_pb2, rpc, worker_pb2
from protos.tracing import NO_TRACING, Span, Tracing, Value

SERVICE = generation_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
WORKER_SERVICE = worker_pb2.DESCRIPTOR.services_by_name["Worker"].full_name
_FINISH_REASONS = {
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
}


class ClusterInfo(Protocol):
    """What a worker knows beyond its own engine. Each may raise a MobulaError."""

    async def model_info(self) -> generation_pb2.GetModelInfoResponse:
        """What is served."""

    async def expert_load(self) -> generation_pb2.GetExpertLoadResponse:
        """Counted load of experts and shards, and this worker's dispatch counters."""

    async def placement(self) -> generation_pb2.GetPlacementResponse:
        """The expert map in use."""


class InferenceServicer:
    """Over raw bytes, so that a malformed request is the client's error."""

    def __init__(
        self,
        engine: Engine,
        request_reader: RequestReader,
        cluster_info: ClusterInfo,
        metrics: EngineMetrics,
        tracing: Tracing = NO_TRACING,
        layers: LayerSampler | None = None,
    ) -> None:
        """layers: shows traced requests one of theirs."""
        self._engine = engine
        self._request_reader = request_reader
        self._cluster_info = cluster_info
        self._metrics = metrics
        self._tracing = tracing
        self._layers = layers

    def handlers(self) -> tuple[grpc.GenericRpcHandler, ...]:
        """For grpc.aio.Server.add_generic_rpc_handlers."""
        methods = {
            "Generate": rpc.stream_handler(self.generate),
            "Tokenize": rpc.unary_handler(self.tokenize),
            "GetModelInfo": rpc.unary_handler(self.get_model_info),
            "GetExpertLoad": rpc.unary_handler(self.get_expert_load),
            "GetPlacement": rpc.unary_handler(self.get_placement),
        }
        # The gateway gives its client time to read, and ends the call of one that does not.
        worker_methods = {"Generate": rpc.stream_handler(self.generate_relayed, read_timeout_s=None)}
        return (
            grpc.method_handlers_generic_handler(SERVICE, methods),
            grpc.method_handlers_generic_handler(WORKER_SERVICE, worker_methods),
        )

    def generate(self, request: bytes, context: grpc.aio.ServicerContext) -> rpc.Responses:
        """Inference.Generate."""
        read = self._request_reader.sequence
        return self._generate(lambda: read(rpc.parse(generation_pb2.GenerateRequest, request)), context)

    def generate_relayed(self, request: bytes, context: grpc.aio.ServicerContext) -> rpc.Responses:
        """Worker.Generate."""
        read = self._request_reader.relayed_sequence
        return self._generate(lambda: read(rpc.parse(worker_pb2.RelayedRequest, request)), context)

    async def _generate(self, read: Callable[[], Sequence], context: grpc.aio.ServicerContext) -> rpc.Responses:
        remaining_s = context.time_remaining()
        deadline_s = math.inf if remaining_s is None else time.monotonic() + remaining_s
        with (
            self._metrics.counted_errors(),
            self._tracing.span("worker.Generate", context.invocation_metadata() or ()) as span,
        ):
            sequence = await asyncio.to_thread(read)
            sequence.deadline_s = deadline_s
            context.add_done_callback(lambda _: self._engine.abort(sequence))
            submitted_s = time.monotonic()
            num_outputs = 0
            async for output in self._outputs(sequence):
                num_outputs += 1
                if num_outputs == 1 and span.is_recorded and sequence.ending is None:
                    self._trace_first_token(span, sequence, submitted_s)
                yield _response(sequence, output).SerializeToString()
            span.note("mobula.num_completion_tokens", sequence.num_output_tokens)

    def _trace_first_token(self, span: Span, sequence: Sequence, submitted_s: float) -> None:
        span.note("mobula.request_id", sequence.request_id)
        span.note("mobula.num_prompt_tokens", sequence.num_prompt_tokens)
        span.add("first token", submitted_s, time.monotonic(), {})
        if self._layers:
            self._layers.ask(lambda sample: trace_layer(span, sample))

    async def tokenize(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        message = rpc.parse(generation_pb2.TokenizeRequest, request)
        response = await asyncio.to_thread(self._request_reader.tokenize, message)
        return response.SerializeToString()

    async def get_model_info(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        rpc.parse(generation_pb2.GetModelInfoRequest, request)
        return (await self._cluster_info.model_info()).SerializeToString()

    async def get_expert_load(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        rpc.parse(generation_pb2.GetExpertLoadRequest, request)
        return (await self._cluster_info.expert_load()).SerializeToString()

    async def get_placement(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        rpc.parse(generation_pb2.GetPlacementRequest, request)
        return (await self._cluster_info.placement()).SerializeToString()

    async def _outputs(self, sequence: Sequence) -> AsyncIterator[SequenceOutput]:
        """Submits the sequence and yields what it gives, to the end. Raises the error that ends it."""
        if sequence.ending is not None:  # its client has every token, and lacks how it ended
            yield sequence.ending
            return
        loop = asyncio.get_running_loop()
        outputs: asyncio.Queue[SequenceOutput] = asyncio.Queue()

        def on_output(output: SequenceOutput) -> None:
            loop.call_soon_threadsafe(outputs.put_nowait, output)

        self._engine.submit(sequence, on_output)
        is_final = False
        while not is_final:
            output = await outputs.get()
            if output.error is not None:
                raise output.error
            yield output
            is_final = output.is_final


def trace_layer(span: Span, sample: LayerSample) -> None:
    """Adds a layer with a part for each shard that it asked, from the times that came with the answers.

    Made here and not by the shard: a forward carries the rows of many requests, of which this is one; so frames need no
    context, a shard's process no exporter, and hosts no common clock.
    """
    values: dict[str, Value] = {"mobula.layer_id": sample.layer_id, "mobula.num_rows": sample.num_rows}
    layer = span.add("layer", sample.begin_s, sample.end_s, values)
    for shard in sample.shards:
        times: dict[str, Value] = {"mobula.queue_s": shard.queue_s, "mobula.compute_s": shard.compute_s}
        layer.add(f"shard {shard.ep_rank}", shard.sent_s, shard.answered_s, times)


def _response(sequence: Sequence, output: SequenceOutput) -> generation_pb2.GenerateResponse:
    response = generation_pb2.GenerateResponse(
        request_id=sequence.request_id,
        text=output.text,
        token_ids=output.token_ids,
        logprobs=[_token_logprob(logprobs) for logprobs in output.logprobs],
    )
    if output.finish_reason is not None:
        response.finish_reason = _FINISH_REASONS[output.finish_reason]
    if output.finish_reason is not None or sequence.num_dropped_assignments or sequence.num_degraded_steps:
        response.usage.num_prompt_tokens = sequence.num_prompt_tokens
        response.usage.num_completion_tokens = sequence.num_output_tokens
        response.usage.num_dropped_assignments = sequence.num_dropped_assignments
        response.usage.num_degraded_steps = sequence.num_degraded_steps
        response.usage.num_received_tokens = sequence.num_received_tokens
    if isinstance(output.matched_stop, str):
        response.matched_stop_string = output.matched_stop
    elif output.matched_stop is not None:
        response.matched_stop_token_id = output.matched_stop
    return response


def _token_logprob(logprobs: TokenLogprobs) -> generation_pb2.TokenLogprob:
    top = [generation_pb2.TopLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in logprobs.top]
    return generation_pb2.TokenLogprob(token_id=logprobs.token_id, logprob=logprobs.logprob, top_logprobs=top)
