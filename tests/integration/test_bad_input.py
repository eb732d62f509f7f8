"""What a client can get wrong, through the gateway: the right status, the value, the limit; the server serves on."""

from collections.abc import Iterator

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from protos import generation_pb2 as pb
from protos.rpc import MAX_CLIENT_MESSAGE_BYTES
from tests.checkpoints import write_checkpoint
from tests.system import System

VOCAB_SIZE, MAX_MODEL_LEN = 320, 512


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    folder = write_checkpoint(tmp_path_factory.mktemp("model"), "v2", seed=1, eos_token_id=[100001, 1])
    workers = {"engine": {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": 8}}
    with System(folder, num_workers=1, num_shards=2, attention_workers=workers) as system:
        yield system


def text(**params: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="hello", sampling_params=pb.SamplingParams(**params))  # type: ignore[arg-type]


def ids(*token_ids: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=token_ids))


def chat(*messages: tuple[str, str]) -> pb.GenerateRequest:
    request = pb.GenerateRequest(chat=pb.Chat())
    for role, content in messages:
        request.chat.messages.add(role=role, content=content)
    return request


BAD_REQUESTS = {
    "no input": (pb.GenerateRequest(), "input", "set text, chat or token_ids"),
    "empty text": (pb.GenerateRequest(text=""), "text", "at least one character"),
    "empty token ids": (ids(), "token_ids", "prompt is empty"),
    "empty chat": (chat(), "chat.messages", "no messages"),
    "unknown role": (chat(("wizard", "hi")), "chat.messages[0].role", "wizard"),
    "token id at the vocabulary's end": (ids(5, VOCAB_SIZE), "token_ids", "320"),
    "largest token id": (ids(2**32 - 1), "token_ids", "4294967295"),
    "prompt too long": (ids(*[5] * MAX_MODEL_LEN), "token_ids", "limit is 511"),
    "text that cannot fit": (pb.GenerateRequest(text="x" * 3_000_000), "text", "3000000 characters"),
    "temperature nan": (text(temperature=float("nan")), "sampling_params.temperature", "nan"),
    "temperature infinite": (text(temperature=float("inf")), "sampling_params.temperature", "inf"),
    "temperature negative": (text(temperature=-0.5), "sampling_params.temperature", "-0.5"),
    "top_p zero": (text(top_p=0.0), "sampling_params.top_p", "above 0"),
    "top_p nan": (text(top_p=float("nan")), "sampling_params.top_p", "nan"),
    "top_p above one": (text(top_p=1.5), "sampling_params.top_p", "1.5"),
    "min_p above one": (text(min_p=2.0), "sampling_params.min_p", "0 to 1"),
    "no tokens": (text(max_tokens=0), "sampling_params.max_tokens", "1 or more"),
    "too many logprobs": (text(logprobs=21), "sampling_params.logprobs", "0 to 20"),
    "empty stop string": (text(stop=[""]), "sampling_params.stop", "at least one character"),
    "long stop string": (text(stop=["x" * 257]), "sampling_params.stop", "256"),
    "many stop strings": (text(stop=["x"] * 17), "sampling_params.stop", "16"),
    "stop token out of range": (text(stop_token_ids=[VOCAB_SIZE]), "sampling_params.stop_token_ids", "320"),
    "long request id": (pb.GenerateRequest(request_id="x" * 129, text="a"), "request_id", "128"),
    "request id that breaks a log line": (pb.GenerateRequest(request_id="a\nb", text="a"), "request_id", "printable"),
}


def test_the_models_end_tokens_are_accepted_as_stop_tokens(system: System) -> None:
    end_tokens = system.stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=10.0).eos_token_ids
    assert end_tokens == [1]  # not one that lies beyond the vocabulary, as models have whose vocabulary was pruned
    assert list(system.stub.Generate(text(stop_token_ids=end_tokens, max_tokens=1), timeout=60.0))


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_bad_request_is_refused_with_its_field_value_and_limit(system: System, case: str) -> None:
    request, field, words = BAD_REQUESTS[case]
    with pytest.raises(grpc.RpcError) as raised:
        list(system.stub.Generate(request, timeout=10.0))
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert words in raised.value.details()
    details = rpc_status.from_call(raised.value).details
    bad_request = error_details_pb2.BadRequest()
    assert [detail.Unpack(bad_request) for detail in details].count(True) == 1
    assert bad_request.field_violations[0].field.startswith(field)
    assert_serves(system)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x12\x02\xff\xfe", "UTF-8"),
        (b"\x12\xff", "not a valid mobula.v1.GenerateRequest"),
        (b"\x98\x06\x01", "has no field number 99"),
        (b"\x00" * 100, "not a valid"),
    ],
)
def test_bytes_that_are_no_request_are_the_clients_fault(system: System, data: bytes, words: str) -> None:
    call = system.channel.unary_stream("/mobula.v1.Inference/Generate")
    with pytest.raises(grpc.RpcError) as raised:
        list(call(data, timeout=10.0))
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert words in raised.value.details()
    assert_serves(system)


def test_a_message_over_the_limit_is_refused_with_the_limit(system: System) -> None:
    request = pb.GenerateRequest(text="x" * (MAX_CLIENT_MESSAGE_BYTES + 1))
    with pytest.raises(grpc.RpcError) as raised:
        list(system.stub.Generate(request, timeout=10.0))
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"limit is {MAX_CLIENT_MESSAGE_BYTES}; send a shorter prompt" in raised.value.details()
    assert_serves(system)


def test_an_unknown_method_is_unimplemented(system: System) -> None:
    call = system.channel.unary_unary("/mobula.v1.Inference/GenerateTwice")
    with pytest.raises(grpc.RpcError) as raised:
        call(b"", timeout=10.0)
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


def assert_serves(system: System) -> None:
    assert len(system.greedy([5, 6, 7], 2)) == 2
