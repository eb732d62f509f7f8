"""A client of the inference API for the command line and the demo. Any stock gRPC client does as well."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import grpc

from protos import generation_pb2, generation_pb2_grpc, rpc

DEFAULT_ADDRESS = "127.0.0.1:50051"
CALL_TIMEOUT_S = 10.0


@dataclass(slots=True)
class Generation:
    """What one Generate call gave so far.

    Attributes:
        first_token_s, total_s: seconds since the call was made.
    """

    prompt: str
    text: str = ""
    num_tokens: int = 0
    first_token_s: float | None = None
    total_s: float = 0.0
    finish_reason: str = ""
    usage: generation_pb2.Usage = field(default_factory=generation_pb2.Usage)


class InferenceClient:
    """Calls a gateway or a worker."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel = grpc.insecure_channel(address, options=rpc.client_options())
        self._stub = generation_pb2_grpc.InferenceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    def generate(
        self, prompt: str, params: generation_pb2.SamplingParams, *, is_chat: bool = False, timeout_s: float = 300.0
    ) -> Iterator[Generation]:
        """The growing answer, once per message of the stream; the same object each time."""
        request = generation_pb2.GenerateRequest(sampling_params=params)
        if is_chat:
            request.chat.messages.add(role="user", content=prompt)
        else:
            request.text = prompt
        generation, start = Generation(prompt), time.monotonic()
        for response in self._stub.Generate(request, timeout=timeout_s):
            generation.total_s = time.monotonic() - start
            if response.token_ids and generation.first_token_s is None:
                generation.first_token_s = generation.total_s
            generation.text += response.text
            generation.num_tokens += len(response.token_ids)
            if response.HasField("finish_reason"):
                name = generation_pb2.FinishReason.Name(response.finish_reason)
                generation.finish_reason = name.removeprefix("FINISH_REASON_").lower()
                generation.usage = response.usage
            yield generation

    def model_info(self) -> generation_pb2.GetModelInfoResponse:
        info: generation_pb2.GetModelInfoResponse = self._stub.GetModelInfo(
            generation_pb2.GetModelInfoRequest(), timeout=CALL_TIMEOUT_S
        )
        return info

    def expert_load(self) -> generation_pb2.GetExpertLoadResponse:
        load: generation_pb2.GetExpertLoadResponse = self._stub.GetExpertLoad(
            generation_pb2.GetExpertLoadRequest(), timeout=CALL_TIMEOUT_S
        )
        return load

    def placement(self) -> generation_pb2.GetPlacementResponse:
        placement: generation_pb2.GetPlacementResponse = self._stub.GetPlacement(
            generation_pb2.GetPlacementRequest(), timeout=CALL_TIMEOUT_S
        )
        return placement
