"""One worker's service over a real connection. The model counts: the next token is the last one plus one."""

import asyncio
import threading
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from prometheus_client import CollectorRegistry

from attention.engine import Engine
from attention.engine_config import EngineConfig
from attention.metrics import EngineMetrics
from attention.model_runner import ModelRunner
from attention.request import GenerationDefaults, RequestReader
from attention.servicer import SERVICE, InferenceServicer
from protos import errors, generation_pb2, rpc
from protos.generation_pb2 import GenerateRequest, GenerateResponse, SamplingParams, TokenIds
from tests.attention.fake_decoder import CountingDecoder, make_byte_tokenizer

pytestmark = pytest.mark.timeout(60)
GREEDY = {"temperature": 0.0}


class FakeClusterInfo:
    async def model_info(self):
        return generation_pb2.GetModelInfoResponse(model_id="counting", vocab_size=300)

    async def expert_load(self):
        return generation_pb2.GetExpertLoadResponse(placement_version=3)

    async def placement(self):
        raise errors.Unavailable("there is no map yet", retry_after_s=2.0)


class Worker:
    def __init__(self, **config):
        self.registry = CollectorRegistry()
        self.decoder = CountingDecoder()
        metrics = EngineMetrics(self.registry, dp_rank=0)
        engine_config = EngineConfig(**{"block_size": 4, "max_num_batched_tokens": 64, **config})
        self.engine = Engine(engine_config, ModelRunner(self.decoder, block_size=4), num_blocks=512, metrics=metrics)
        tokenizer = make_byte_tokenizer(chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
        reader = RequestReader(
            tokenizer, defaults=GenerationDefaults(temperature=0.0), vocab_size=300, max_model_len=1024
        )
        self.servicer = InferenceServicer(self.engine, reader, FakeClusterInfo(), metrics)

    def method(self, name, response_class, stream=False):
        kind = self.channel.unary_stream if stream else self.channel.unary_unary
        return kind(f"/{SERVICE}/{name}", response_deserializer=response_class.FromString)

    def generate(self, request):
        data = request if isinstance(request, bytes) else request.SerializeToString()
        return self.method("Generate", GenerateResponse, stream=True)(data)

    async def collect(self, request):
        return [response async for response in self.generate(request)]

    async def until_idle(self):
        while self.engine.stats.num_free_blocks < 512 or self.engine._requests:
            await asyncio.sleep(0.001)

    def num_errors(self, code):
        return self.registry.get_sample_value("mobula_request_errors_total", {"dp_rank": "0", "code": code})


@asynccontextmanager
async def running_worker(**config):
    worker = Worker(**config)
    server = grpc.aio.server(options=rpc.client_options())
    server.add_generic_rpc_handlers(worker.servicer.handlers())
    port = server.add_insecure_port("127.0.0.1:0")
    worker.engine.start()
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            worker.channel = channel
            yield worker
            await worker.until_idle()
    finally:
        await asyncio.to_thread(worker.engine.stop)
        await server.stop(None)


def serve(scenario, **config):
    async def run():
        async with running_worker(**config) as worker:
            await scenario(worker)

    asyncio.run(run())


class Gate:
    """Holds the engine's steps until opened: every one, or those that compute a certain token."""

    def __init__(self, decoder, token_id=None):
        self.token_id = token_id
        self.is_open = threading.Event()
        self.entered = threading.Event()
        decoder.before_forward = self

    def __call__(self, token_ids):
        if self.token_id in (None, *token_ids.tolist()):
            self.entered.set()
            self.is_open.wait()


def test_tokens_and_text_stream_to_the_end_with_usage():
    async def scenario(worker):
        responses = await worker.collect(
            GenerateRequest(request_id="mine", text="a", sampling_params=SamplingParams(max_tokens=3))
        )
        assert [list(response.token_ids) for response in responses] == [[98], [99], [100]]
        assert [response.text for response in responses] == ["b", "c", "d"]
        assert {response.request_id for response in responses} == {"mine"}
        assert [response.HasField("finish_reason") for response in responses] == [False, False, True]
        last = responses[-1]
        assert last.finish_reason == generation_pb2.FINISH_REASON_LENGTH
        assert (last.usage.num_prompt_tokens, last.usage.num_completion_tokens) == (1, 3)

    serve(scenario)


def test_a_client_that_has_every_token_is_told_how_the_answer_ended_and_nothing_is_computed():
    async def scenario(worker):
        wanted = {"text": "a", "sampling_params": SamplingParams(max_tokens=3)}
        first = await worker.collect(GenerateRequest(**wanted))
        worker.decoder.before_forward = lambda token_ids: pytest.fail("a step")
        (again,) = await worker.collect(GenerateRequest(**wanted, received_token_ids=[98, 99, 100]))
        assert (list(again.token_ids), again.text, again.finish_reason) == ([], "", first[-1].finish_reason)
        assert (again.usage.num_completion_tokens, again.usage.num_received_tokens) == (3, 3)

    serve(scenario)


def test_end_of_sequence_stop_token_and_stop_string_end_the_stream():
    async def scenario(worker):
        responses = await worker.collect(GenerateRequest(token_ids=TokenIds(ids=[254])))
        assert [list(response.token_ids) for response in responses] == [[255], [256], [257]]
        assert responses[-1].finish_reason == generation_pb2.FINISH_REASON_STOP
        assert responses[-1].WhichOneof("matched_stop") is None

        responses = await worker.collect(
            GenerateRequest(text="a", sampling_params=SamplingParams(stop_token_ids=[101]))
        )
        assert "".join(response.text for response in responses) == "bcd"
        assert responses[-1].matched_stop_token_id == 101

        responses = await worker.collect(GenerateRequest(text="a", sampling_params=SamplingParams(stop=["efg", "df"])))
        assert "".join(response.text for response in responses) == "bcd"
        assert responses[-1].matched_stop_string == "efg"
        assert responses[-1].usage.num_completion_tokens == 6

    serve(scenario)


def test_logprobs_come_with_each_token():
    async def scenario(worker):
        params = SamplingParams(max_tokens=2, logprobs=2)
        for response in await worker.collect(GenerateRequest(text="a", sampling_params=params)):
            assert [logprob.token_id for logprob in response.logprobs] == list(response.token_ids)
            assert [top.token_id for top in response.logprobs[0].top_logprobs] == [response.token_ids[0], 0]
            assert response.logprobs[0].logprob == response.logprobs[0].top_logprobs[0].logprob < 0

    serve(scenario)


def test_first_token_arrives_while_the_rest_is_not_yet_computed():
    async def scenario(worker):
        gate = Gate(worker.decoder, token_id=98)
        call = worker.generate(GenerateRequest(text="a", sampling_params=SamplingParams(max_tokens=2)))
        assert list((await call.read()).token_ids) == [98]
        gate.is_open.set()
        assert list((await call.read()).token_ids) == [99]

    serve(scenario)


def test_cancelled_call_frees_its_blocks():
    async def scenario(worker):
        call = worker.generate(GenerateRequest(text="a", sampling_params=SamplingParams(ignore_eos=True)))
        await call.read()
        call.cancel()
        await worker.until_idle()
        while worker.num_errors("CANCELLED") is None:
            await asyncio.sleep(0.001)
        assert worker.num_errors("CANCELLED") == 1

    serve(scenario)


def test_waiting_call_can_be_cancelled_before_it_runs():
    async def scenario(worker):
        gate = Gate(worker.decoder)
        first = asyncio.create_task(
            worker.collect(GenerateRequest(text="a", sampling_params=SamplingParams(max_tokens=2)))
        )
        await asyncio.to_thread(gate.entered.wait)
        second = worker.generate(GenerateRequest(text="x"))
        while worker.engine._num_not_started == 0:
            await asyncio.sleep(0.001)
        second.cancel()
        gate.is_open.set()
        assert len(await first) == 2
        await worker.until_idle()

    serve(scenario, max_num_seqs=1)


def test_client_that_does_not_read_and_leaves_frees_its_blocks():
    async def scenario(worker):
        call = worker.generate(GenerateRequest(text="a", sampling_params=SamplingParams(ignore_eos=True, logprobs=20)))
        await call.read()
        await asyncio.sleep(0.05)
        del call
        await worker.channel.close()
        await worker.until_idle()

    serve(scenario)


def test_call_past_its_deadline_frees_its_blocks():
    async def scenario(worker):
        gate = Gate(worker.decoder)
        method = worker.method("Generate", GenerateResponse, stream=True)
        call = method(GenerateRequest(text="a").SerializeToString(), timeout=0.1)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call.read()
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        gate.is_open.set()
        await worker.until_idle()

    serve(scenario)


async def status_of(call):
    async def end():
        if not hasattr(call, "read"):
            await call
            return
        while await call.read() is not grpc.aio.EOF:
            pass

    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await end()
    details = {}
    for packed in rpc_status.from_call(raised.value).details:
        for kind in (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo):
            if packed.Is(kind.DESCRIPTOR):
                details[kind] = kind.FromString(packed.value)
    return raised.value.code(), raised.value.details(), details


@pytest.mark.parametrize(
    ("request_", "field", "message"),
    [
        (GenerateRequest(), "input", "set text, chat or token_ids"),
        (GenerateRequest(text="x" * 2000), "text", "2000 tokens, limit is 1023"),
        (GenerateRequest(token_ids=TokenIds(ids=[300])), "token_ids.ids", "vocab_size is 300"),
        (GenerateRequest(text="a", sampling_params=SamplingParams(top_p=7.0)), "sampling_params.top_p", "at most 1"),
    ],
)
def test_bad_request_is_an_invalid_argument_that_names_its_field(request_, field, message):
    async def scenario(worker):
        code, text, details = await status_of(worker.generate(request_))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert message in text
        assert details[error_details_pb2.BadRequest].field_violations[0].field == field
        assert worker.num_errors("INVALID_ARGUMENT") == 1

    serve(scenario)


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x12\x02\xff\xfe", b"\x12\x7fa"])
def test_bytes_that_are_no_request_are_an_invalid_argument(data):
    async def scenario(worker):
        code, _, _ = await status_of(worker.generate(data))
        assert code is grpc.StatusCode.INVALID_ARGUMENT

    serve(scenario)


def test_full_queue_is_resource_exhausted_with_a_hint_when_to_retry():
    async def scenario(worker):
        gate = Gate(worker.decoder)
        request = GenerateRequest(text="a", sampling_params=SamplingParams(max_tokens=1))
        tasks = [asyncio.create_task(worker.collect(request))]
        await asyncio.to_thread(gate.entered.wait)
        tasks.append(asyncio.create_task(worker.collect(request)))
        while worker.engine._num_not_started == 0:
            await asyncio.sleep(0.001)
        code, _, details = await status_of(worker.generate(request))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details[error_details_pb2.RetryInfo].retry_delay.seconds == 1
        gate.is_open.set()
        assert [len(responses) for responses in await asyncio.gather(*tasks)] == [1, 1]

    serve(scenario, max_num_waiting=1)


def test_lost_shard_is_unavailable_and_the_worker_serves_on():
    async def scenario(worker):
        request = GenerateRequest(text="a", sampling_params=SamplingParams(max_tokens=1))

        def fail(token_ids):
            raise errors.ShardUnavailable("no replica of unit 3 answers")

        worker.decoder.before_forward = fail
        code, text, details = await status_of(worker.generate(request))
        assert (code, text) == (grpc.StatusCode.UNAVAILABLE, "no replica of unit 3 answers")
        assert details[error_details_pb2.ErrorInfo].reason == "SHARD_UNAVAILABLE"
        worker.decoder.before_forward = lambda token_ids: None
        assert len(await worker.collect(request)) == 1

    serve(scenario)


def test_twenty_clients_at_once_each_get_their_own_tokens():
    async def scenario(worker):
        async def one(i):
            params = SamplingParams(max_tokens=20 + i)
            responses = await worker.collect(GenerateRequest(token_ids=TokenIds(ids=[i]), sampling_params=params))
            tokens = [token_id for response in responses for token_id in response.token_ids]
            assert tokens == list(range(i + 1, 2 * i + 21))

        await asyncio.gather(*[one(i) for i in range(20)])
        await worker.until_idle()

    serve(scenario, max_num_seqs=6)


def test_other_methods_answer_and_delegate():
    async def scenario(worker):
        tokenize = worker.method("Tokenize", generation_pb2.TokenizeResponse)
        response = await tokenize(generation_pb2.TokenizeRequest(text="hé").SerializeToString())
        assert list(response.token_ids) == [104, 195, 169]
        info = await worker.method("GetModelInfo", generation_pb2.GetModelInfoResponse)(b"")
        assert info.model_id == "counting"
        load = await worker.method("GetExpertLoad", generation_pb2.GetExpertLoadResponse)(b"")
        assert load.placement_version == 3
        code, _, _ = await status_of(worker.method("GetPlacement", generation_pb2.GetPlacementResponse)(b""))
        assert code is grpc.StatusCode.UNAVAILABLE

    serve(scenario)


def test_stopping_the_engine_ends_open_calls_as_unavailable():
    async def scenario(worker):
        gate = Gate(worker.decoder, token_id=98)
        call = worker.generate(GenerateRequest(text="a", sampling_params=SamplingParams(ignore_eos=True)))
        await asyncio.to_thread(gate.entered.wait)
        stopping = asyncio.create_task(asyncio.to_thread(worker.engine.stop))
        while worker.engine._is_accepting:
            await asyncio.sleep(0.001)
        gate.is_open.set()
        await stopping
        code, _, _ = await status_of(call)
        assert code is grpc.StatusCode.UNAVAILABLE

    serve(scenario)
