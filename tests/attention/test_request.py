import math

import pytest

from attention.request import GenerationDefaults, RequestReader
from attention.sequence import FinishReason
from attention.tokenizer import BadTokenizer
from protos import errors
from protos.generation_pb2 import Chat, ChatMessage, GenerateRequest, SamplingParams, TokenIds, TokenizeRequest
from protos.worker_pb2 import RelayedRequest
from tests.attention.fake_decoder import make_byte_tokenizer

TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}"


def make_reader(max_model_len=16, template=TEMPLATE, **defaults):
    return RequestReader(
        make_byte_tokenizer(chat_template=template, adds_bos=True),
        defaults=GenerationDefaults(**defaults),
        vocab_size=300,
        max_model_len=max_model_len,
        draw_seed=lambda: 99,
    )


def read(reader=None, **fields):
    return (reader or make_reader()).sequence(GenerateRequest(**fields))


def test_text_chat_and_token_ids_become_prompts():
    user = Chat(messages=[ChatMessage(role="user", content="a")])
    assert read(text="ab").prompt_token_ids == [256, 97, 98]
    assert read(chat=user).prompt_token_ids == [256, 97]
    assert read(token_ids=TokenIds(ids=[299, 0])).prompt_token_ids == [299, 0]


def test_unset_parameters_come_from_the_model_and_set_ones_stand_even_when_zero():
    reader = make_reader(temperature=0.3, top_p=0.95, top_k=7)
    params = read(reader, text="a").sampling_params
    assert (params.temperature, params.top_p, params.top_k, params.seed, params.logprobs) == (0.3, 0.95, 7, 99, None)
    given = SamplingParams(temperature=0, top_k=0, seed=0, logprobs=0, skip_special_tokens=False)
    params = read(reader, text="a", sampling_params=given).sampling_params
    assert (params.temperature, params.top_p, params.top_k, params.seed, params.logprobs) == (0.0, 0.95, 0, 0, 0)
    assert not params.skip_special_tokens


def test_unset_max_tokens_is_what_the_prompt_leaves_free():
    sequence = read(text="ab")
    assert (sequence.sampling_params.max_tokens, sequence.max_num_tokens) == (13, 16)


def test_larger_max_tokens_end_with_the_context():
    assert read(text="ab", sampling_params=SamplingParams(max_tokens=5)).max_num_tokens == 8
    assert read(text="ab", sampling_params=SamplingParams(max_tokens=500)).max_num_tokens == 16


def test_request_gets_an_id_unless_it_has_one():
    assert read(text="a", request_id="mine").request_id == "mine"
    assert read(text="a").request_id != read(text="a").request_id


def relayed(token_ids=(), **fields):
    request = GenerateRequest(**fields).SerializeToString()
    return RelayedRequest(request=request, request_id="gateway's", seed=7, output_token_ids=token_ids)


def test_a_relayed_request_takes_what_it_lacks_from_the_gateway():
    sequence = make_reader().relayed_sequence(relayed(text="a"))
    assert (sequence.request_id, sequence.sampling_params.seed) == ("gateway's", 7)
    own = relayed(text="a", request_id="mine", sampling_params=SamplingParams(seed=0))
    sequence = make_reader().relayed_sequence(own)
    assert (sequence.request_id, sequence.sampling_params.seed) == ("mine", 0)


def test_tokens_that_the_client_has_count_as_output_and_are_not_told_again():
    request = relayed([98, 99], text="a", sampling_params=SamplingParams(max_tokens=4, stop=["bcde"]))
    sequence = make_reader().relayed_sequence(request)
    assert (sequence.prompt_token_ids, sequence.output_token_ids) == ([256, 97], [98, 99])
    assert sequence.max_num_tokens == 6
    request.num_degraded_steps, request.num_dropped_assignments = 3, 4
    again = make_reader().relayed_sequence(request)
    assert (again.num_degraded_steps, again.num_dropped_assignments) == (3, 4)
    assert sequence.advance(100).text == ""  # may still become the stop string
    assert sequence.advance(102).text == "bcdf"


def test_a_client_that_has_the_beginning_is_told_the_rest_by_whichever_worker():
    wanted = {"text": "a", "sampling_params": SamplingParams(max_tokens=6), "received_token_ids": [98, 99]}
    sequence = read(**wanted)
    assert (sequence.output_token_ids, sequence.max_num_tokens) == ([98, 99], 8)
    assert make_reader().relayed_sequence(relayed([100], **wanted)).num_received_tokens == 2  # not the other worker's
    assert sequence.advance(100).text == "d"
    assert make_reader().relayed_sequence(relayed([100], **wanted)).output_token_ids == [98, 99, 100]


@pytest.mark.parametrize(
    ("received", "params", "reason", "matched_stop"),
    [
        ([98] * 6, {"max_tokens": 6}, FinishReason.LENGTH, None),
        ([98] * 14, {}, FinishReason.LENGTH, None),  # of the context
        ([98, 257], {}, FinishReason.STOP, None),  # an end of sequence
        ([98, 99], {"stop_token_ids": [99]}, FinishReason.STOP, 99),
        ([98, 99], {"stop": ["bc"]}, FinishReason.STOP, "bc"),
    ],
)
def test_a_client_that_has_the_whole_answer_is_told_how_it_ended_as_the_first_time(
    received, params, reason, matched_stop
):
    fields = {"text": "a", "sampling_params": SamplingParams(**params)}
    first = read(**fields)
    outputs = [first.advance(token_id) for token_id in received]
    again = read(**fields, received_token_ids=received)
    assert (again.ending.finish_reason, again.ending.matched_stop) == (reason, matched_stop)
    assert (outputs[-1].finish_reason, outputs[-1].matched_stop) == (reason, matched_stop)
    assert (again.ending.token_ids, again.ending.text) == ((), "")  # those it has
    assert (again.num_output_tokens, again.num_received_tokens) == (len(received), len(received))
    assert read(**fields, received_token_ids=received[:-1]).ending is None


def test_tokens_beyond_the_end_of_the_answer_are_refused():
    with pytest.raises(errors.InvalidRequest, match="ends with token 4 of the 6 given") as raised:
        read(text="a", sampling_params=SamplingParams(max_tokens=4), received_token_ids=[98] * 6)
    assert raised.value.field == "received_token_ids"


@pytest.mark.parametrize(
    ("token_ids", "message"), [([98, 99], "ends with token 1 of the 2 given"), ([300], "token id 300 at index 0")]
)
def test_tokens_that_no_answer_begins_with_are_refused(token_ids, message):
    request = relayed(token_ids, text="a", sampling_params=SamplingParams(max_tokens=1))
    with pytest.raises(errors.InvalidRequest, match=message):
        make_reader().relayed_sequence(request)


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({}, "input", "set text, chat or token_ids"),
        ({"text": ""}, "text", "empty"),
        ({"token_ids": TokenIds()}, "token_ids", "prompt is empty"),
        ({"token_ids": TokenIds(ids=[1, 300])}, "token_ids.ids", "token id 300 at index 1 .* vocab_size is 300"),
        ({"chat": Chat()}, "chat.messages", "no messages"),
        (
            {"chat": Chat(messages=[ChatMessage(role="user"), ChatMessage(role="robot")])},
            "chat.messages[1].role",
            "role is 'robot', must be one of system, user, assistant",
        ),
        ({"text": "a", "request_id": "x" * 129}, "request_id", "has 129 characters, must be at most 128"),
        ({"text": "a", "request_id": "x\ny"}, "request_id", r"has U\+000A at index 1, must be printable"),
        ({"text": "a", "sampling_params": SamplingParams(temperature=math.nan)}, "sampling_params.temperature", "nan"),
        ({"text": "a", "sampling_params": SamplingParams(max_tokens=0)}, "sampling_params.max_tokens", "1 or more"),
        ({"text": "a", "sampling_params": SamplingParams(stop=[""])}, "sampling_params.stop", "at least one"),
        (
            {"text": "a", "sampling_params": SamplingParams(stop_token_ids=[300])},
            "sampling_params.stop_token_ids",
            "token id 300",
        ),
    ],
)
def test_bad_request_is_refused_with_its_field(fields, field, message):
    with pytest.raises(errors.InvalidRequest, match=message) as raised:
        read(**fields)
    assert raised.value.field == field


def test_prompt_that_leaves_no_room_for_an_answer_is_refused_with_the_numbers():
    assert read(text="x" * 14).max_num_tokens == 16
    with pytest.raises(errors.PromptTooLong, match=r"has 16 tokens, limit is 15 .* shorten it, or raise max_model_len"):
        read(text="x" * 15)


def test_chat_for_a_model_without_template_is_refused():
    with pytest.raises(errors.InvalidRequest, match="no chat template"):
        read(make_reader(template=None), chat=Chat(messages=[ChatMessage(role="user", content="a")]))


def test_tokenize_gives_the_ids_that_generate_sees_and_their_texts():
    response = make_reader().tokenize(TokenizeRequest(text="aé"))
    assert list(response.token_ids) == [256, 97, 195, 169]
    assert list(response.tokens) == ["<bos>", "a", "�", "�"]
    with pytest.raises(errors.InvalidRequest, match="set text or chat"):
        make_reader().tokenize(TokenizeRequest())


def test_defaults_are_read_from_generation_config(tmp_path):
    assert GenerationDefaults.read(tmp_path) == GenerationDefaults()
    path = tmp_path / "generation_config.json"
    path.write_text('{"do_sample": true, "temperature": 0.3, "top_p": 0.95, "top_k": null, "eos_token_id": 1}')
    assert GenerationDefaults.read(tmp_path) == GenerationDefaults(temperature=0.3, top_p=0.95)
    path.write_text('{"do_sample": false, "top_k": 5}')
    assert GenerationDefaults.read(tmp_path) == GenerationDefaults(temperature=0.0, top_k=5)


@pytest.mark.parametrize("content", ["{", "[]", '{"top_p": 2.0}', '{"temperature": "hot"}'])
def test_unusable_generation_config_is_named(tmp_path, content):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(BadTokenizer, match=r"generation_config\.json"):
        GenerationDefaults.read(tmp_path)
