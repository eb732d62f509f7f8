"""A client's request becomes a sequence, or an error that says what is wrong with it and what would be right.

Knows nothing of the engine or of gRPC. Encoding text takes time: call it outside of the event loop.
"""

import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from attention.detokenizer import Detokenizer
from attention.sampling_params import InvalidSamplingParams, SamplingParams
from attention.sequence import Sequence
from attention.tokenizer import MAX_FILE_BYTES, BadTokenizer, ChatMessages, Tokenizer
from protos import errors, generation_pb2, rpc, worker_pb2
from protos.bounded_file import read_bounded, why_unreadable

MAX_REQUEST_ID_CHARS = 128  # it is repeated in every answer and log line
CHAT_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """Sampling parameters of a request that does not set them."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        SamplingParams(
            temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, min_p=self.min_p, seed=0, max_tokens=1
        )

    @classmethod
    def read(cls, folder: Path) -> "GenerationDefaults":
        """Of the checkpoint's generation_config.json; neutral where it says nothing. `do_sample: false` is greedy.

        Raises BadTokenizer when the file cannot be used.
        """
        path = folder / "generation_config.json"
        if not path.is_file():
            return cls()
        try:
            config = json.loads(read_bounded(path, MAX_FILE_BYTES))
            values = {name: config[name] for name in cls.__slots__ if config.get(name) is not None}
            if config.get("do_sample") is False:
                values["temperature"] = 0.0
            return cls(**values)
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise BadTokenizer(f"{path} cannot be used: {why_unreadable(error)}") from error


def draw_seed() -> int:
    """A seed for a request without one."""
    return secrets.randbits(64)


class RequestReader:
    """Reads requests for one model."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        defaults: GenerationDefaults,
        vocab_size: int,
        max_model_len: int,
        draw_seed: Callable[[], int] = draw_seed,
    ) -> None:
        """vocab_size: the model's; max_model_len: tokens of prompt and output together."""
        self._tokenizer = tokenizer
        self._defaults = defaults
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._draw_seed = draw_seed

    def sequence(self, request: generation_pb2.GenerateRequest) -> Sequence:
        """With the tokens that its client has as if they were sampled here; they may be all of them: see its `ending`.

        Raises InvalidRequest and its kinds: PromptTooLong, NoChatTemplate, ChatTemplateRefused.
        """
        request_id = _request_id(request.request_id)
        prompt_token_ids = self._prompt(request)
        params = self._sampling_params(request.sampling_params, self._max_model_len - len(prompt_token_ids))
        sequence = Sequence(
            request_id=request_id,
            prompt_token_ids=prompt_token_ids,
            sampling_params=params,
            max_num_tokens=min(len(prompt_token_ids) + params.max_tokens, self._max_model_len),
            eos_token_ids=self._tokenizer.eos_token_ids,
            text_decoder=Detokenizer(self._tokenizer, stop=params.stop, skip_special_tokens=params.skip_special_tokens),
            allows_missing_experts=request.allow_missing_experts,
        )
        self._go_on_after(sequence, list(request.received_token_ids), "received_token_ids")
        sequence.num_received_tokens = sequence.num_output_tokens
        return sequence

    def relayed_sequence(self, relayed: worker_pb2.RelayedRequest) -> Sequence:
        """A request that a gateway passed on, also with the tokens of another worker. Raises as `sequence`."""
        request = rpc.parse(generation_pb2.GenerateRequest, relayed.request)
        if not request.request_id:
            request.request_id = relayed.request_id
        if not request.sampling_params.HasField("seed"):
            request.sampling_params.seed = relayed.seed
        sequence = self.sequence(request)
        sequence.num_dropped_assignments = relayed.num_dropped_assignments
        sequence.num_degraded_steps = relayed.num_degraded_steps
        self._go_on_after(sequence, list(relayed.output_token_ids), "output_token_ids")
        return sequence

    def _go_on_after(self, sequence: Sequence, token_ids: list[int], field: str) -> None:
        """Text is a function of the tokens so far, so what the client has of it is made again and left away.

        Raises InvalidRequest when the tokens cannot be the beginning of an answer, nor a whole one.
        """
        for num_before, token_id in enumerate(self._token_ids(token_ids, field)):
            if sequence.ending is not None:
                raise errors.InvalidRequest(
                    f"the answer ends with token {num_before} of the {len(token_ids)} given; send only those that came",
                    field=field,
                )
            output = sequence.advance(token_id)
            if output.is_final:
                sequence.ending = replace(output, token_ids=(), text="")

    def tokenize(self, request: generation_pb2.TokenizeRequest) -> generation_pb2.TokenizeResponse:
        """The token ids as `sequence` would see them, of any length."""
        match request.WhichOneof("input"):
            case "text":
                token_ids = self._text(request.text)
            case "chat":
                token_ids = self._chat(request.chat)
            case _:
                raise errors.InvalidRequest("the request has no input; set text or chat", field="input")
        return generation_pb2.TokenizeResponse(token_ids=token_ids, tokens=self._tokenizer.token_texts(token_ids))

    def _prompt(self, request: generation_pb2.GenerateRequest) -> list[int]:
        name = request.WhichOneof("input")
        match name:
            case "text":
                token_ids = self._text(request.text)
            case "chat":
                token_ids = self._chat(request.chat)
            case "token_ids":
                token_ids = self._token_ids(list(request.token_ids.ids), "token_ids.ids")
            case _:
                raise errors.InvalidRequest("the request has no input; set text, chat or token_ids", field="input")
        if not token_ids:
            raise errors.InvalidRequest("the prompt is empty; send at least one token", field=name)
        limit = self._max_model_len - 1  # one is left for the answer
        if len(token_ids) > limit:
            raise errors.PromptTooLong(
                f"the prompt has {len(token_ids)} tokens, limit is {limit} (max_model_len {self._max_model_len}, one "
                "token of it for the answer); shorten it, or raise max_model_len where model and cache hold more",
                field=name,
            )
        return token_ids

    def _text(self, text: str) -> list[int]:
        if not text:
            raise errors.InvalidRequest("the text is empty; send at least one character", field="text")
        self._check_num_chars(len(text), "text")
        return self._tokenizer.encode_text(text)

    def _chat(self, chat: generation_pb2.Chat) -> list[int]:
        if not chat.messages:
            raise errors.InvalidRequest("the chat has no messages; send at least one", field="chat.messages")
        messages: ChatMessages = []
        for i, message in enumerate(chat.messages):
            if message.role not in CHAT_ROLES:
                raise errors.InvalidRequest(
                    f"role is {message.role!r}, must be one of {', '.join(CHAT_ROLES)}",
                    field=f"chat.messages[{i}].role",
                )
            messages.append({"role": message.role, "content": message.content})
        self._check_num_chars(sum(len(message["content"]) for message in messages), "chat")
        return self._tokenizer.encode_chat(messages)

    def _check_num_chars(self, num_chars: int, field: str) -> None:
        """Refuses what cannot fit before it is tokenised, which takes seconds for megabytes."""
        limit = self._max_model_len * self._tokenizer.max_token_chars
        if num_chars > limit:
            raise errors.PromptTooLong(
                f"the prompt has {num_chars} characters, more than {self._max_model_len} tokens (max_model_len) "
                f"can hold ({limit}); shorten it",
                field=field,
            )

    def _token_ids(self, token_ids: list[int], field: str) -> list[int]:
        for i, token_id in enumerate(token_ids):
            if token_id >= self._vocab_size:
                raise errors.InvalidRequest(
                    f"token id {token_id} at index {i} does not exist, vocab_size is {self._vocab_size}", field=field
                )
        return token_ids

    def _sampling_params(self, params: generation_pb2.SamplingParams, num_left: int) -> SamplingParams:
        """num_left: tokens of the context that the prompt leaves free."""

        def value(name: str, default: Any) -> Any:
            return getattr(params, name) if params.HasField(name) else default

        stop_token_ids = self._token_ids(list(params.stop_token_ids), "sampling_params.stop_token_ids")
        try:
            return SamplingParams(
                temperature=value("temperature", self._defaults.temperature),
                top_p=value("top_p", self._defaults.top_p),
                top_k=value("top_k", self._defaults.top_k),
                min_p=value("min_p", self._defaults.min_p),
                seed=params.seed if params.HasField("seed") else self._draw_seed(),
                max_tokens=value("max_tokens", num_left),
                stop=tuple(params.stop),
                stop_token_ids=tuple(stop_token_ids),
                ignore_eos=params.ignore_eos,
                logprobs=value("logprobs", None),
                skip_special_tokens=value("skip_special_tokens", True),
            )
        except InvalidSamplingParams as error:
            raise errors.InvalidRequest(str(error), field=f"sampling_params.{error.field}") from error


def _request_id(request_id: str) -> str:
    """The client's id, or a new one. Raises InvalidRequest for what would spoil a log line."""
    if len(request_id) > MAX_REQUEST_ID_CHARS:
        raise errors.InvalidRequest(
            f"request_id has {len(request_id)} characters, must be at most {MAX_REQUEST_ID_CHARS}", field="request_id"
        )
    for i, character in enumerate(request_id):
        if not character.isprintable():
            raise errors.InvalidRequest(
                f"request_id has U+{ord(character):04X} at index {i}, must be printable characters", field="request_id"
            )
    return request_id or secrets.token_hex(8)
