"""Clients of the inference API and of the admin calls, for the command line and the demo. Any stock gRPC client does as
well.
"""

import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import grpc

from cluster.client_access import ClientAccess
from protos import admin_pb2, admin_pb2_grpc, generation_pb2, generation_pb2_grpc, rpc

DEFAULT_ADDRESS = "127.0.0.1:50051"
CALL_TIMEOUT_S = 10.0
REBALANCE_TIMEOUT_S = 70.0  # more than gateway and controller give a plan, who say better what was late
BROKEN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)  # of a connection that ends, of a server that stops
RESUME_S = 60.0  # after its latest token, that the rest of a broken answer is asked for
RESUME_PAUSE_S = 0.25  # between two times
RECONNECT_OPTIONS = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1000)]


@dataclass(slots=True)
class Generation:
    """What one Generate call gave so far.

    Attributes:
        token_ids: of the answer so far.
        first_token_s, total_s: seconds since the call was made.
    """

    prompt: str
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    first_token_s: float | None = None
    total_s: float = 0.0
    finish_reason: str = ""
    usage: generation_pb2.Usage = field(default_factory=generation_pb2.Usage)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def take(self, response: generation_pb2.GenerateResponse, now_s: float) -> None:
        """Adds what a message brought. now_s: seconds since the call was made."""
        self.total_s = now_s
        if response.token_ids and self.first_token_s is None:
            self.first_token_s = now_s
        self.text += response.text
        self.token_ids += response.token_ids
        if response.HasField("finish_reason"):
            name = generation_pb2.FinishReason.Name(response.finish_reason)
            self.finish_reason = name.removeprefix("FINISH_REASON_").lower()
            self.usage = response.usage


class Connection:
    """A channel that is closed at the end of a `with` block."""

    def __init__(self, address: str, access: ClientAccess | None = None) -> None:
        """access: None for what the environment says. Raises AccessError."""
        self.address = address
        self._is_closed = False
        self._channel = (access or ClientAccess.from_environment()).channel(
            address, [*rpc.client_options(), *RECONNECT_OPTIONS]
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends what is under way."""
        self._is_closed = True
        self._channel.close()


class InferenceClient(Connection):
    """Calls a gateway or a worker."""

    def __init__(self, address: str, access: ClientAccess | None = None) -> None:
        super().__init__(address, access)
        self._stub = generation_pb2_grpc.InferenceStub(self._channel)

    def generate(
        self,
        prompt: str,
        params: generation_pb2.SamplingParams,
        *,
        is_chat: bool = False,
        timeout_s: float = 300.0,
        on_break: Callable[[], None] = lambda: None,
    ) -> Iterator[Generation]:
        """The growing answer, once per message of the stream; the same object each time.

        Where the connection breaks after the first token the rest is asked for, of whichever gateway answers then, for
        RESUME_S; the answer is what it would have been. on_break: called then, before it is. Raises grpc.RpcError.
        """
        request = generation_pb2.GenerateRequest(sampling_params=params)
        if not params.HasField("seed"):  # without one the rest would be drawn otherwise
            request.sampling_params.seed = secrets.randbits(63)
        if is_chat:
            request.chat.messages.add(role="user", content=prompt)
        else:
            request.text = prompt
        generation, start = Generation(prompt), time.monotonic()
        while True:
            try:
                for response in self._stub.Generate(request, timeout=timeout_s - (time.monotonic() - start)):
                    generation.take(response, time.monotonic() - start)
                    yield generation
            except grpc.RpcError as error:
                waited_s = time.monotonic() - start - generation.total_s
                if self._is_closed or error.code() not in BROKEN or not generation.token_ids or waited_s >= RESUME_S:
                    raise
            else:
                return
            if len(generation.token_ids) > len(request.received_token_ids):  # else it is broken still
                on_break()
            time.sleep(RESUME_PAUSE_S)
            del request.received_token_ids[:]
            request.received_token_ids.extend(generation.token_ids)

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


class AdminClient(Connection):
    """Calls a gateway, which passes it on to the controller."""

    def __init__(self, address: str, access: ClientAccess | None = None) -> None:
        super().__init__(address, access)
        self._stub = admin_pb2_grpc.AdminStub(self._channel)

    def status(self) -> admin_pb2.GetStatusResponse:
        status: admin_pb2.GetStatusResponse = self._stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=CALL_TIMEOUT_S)
        return status

    def rebalance(self, *, is_dry_run: bool) -> admin_pb2.RebalanceResponse:
        """What is done, or would be. Returns when it has begun."""
        plan: admin_pb2.RebalanceResponse = self._stub.Rebalance(
            admin_pb2.RebalanceRequest(dry_run=is_dry_run), timeout=REBALANCE_TIMEOUT_S
        )
        return plan

    def sample_choices(self) -> admin_pb2.SampleChoicesResponse:
        """Which experts tokens chose since this was asked last."""
        sampled: admin_pb2.SampleChoicesResponse = self._stub.SampleChoices(
            admin_pb2.SampleChoicesRequest(), timeout=CALL_TIMEOUT_S
        )
        return sampled

    def scale_shards(self, count: int) -> admin_pb2.ScaleShardsResponse:
        """From now on that many shards. Returns when it is decided."""
        change: admin_pb2.ScaleShardsResponse = self._stub.ScaleShards(
            admin_pb2.ScaleShardsRequest(count=count), timeout=REBALANCE_TIMEOUT_S
        )
        return change

    def scale_workers(self, count: int) -> admin_pb2.ScaleWorkersResponse:
        """From now on that many workers. Returns when it is decided."""
        change: admin_pb2.ScaleWorkersResponse = self._stub.ScaleWorkers(
            admin_pb2.ScaleWorkersRequest(count=count), timeout=REBALANCE_TIMEOUT_S
        )
        return change

    def drain(self, role: "admin_pb2.ProcessRole", rank: int) -> None:
        """That process is to end without a request noticing. Returns when it is decided."""
        self._stub.Drain(admin_pb2.DrainRequest(role=role, rank=rank), timeout=REBALANCE_TIMEOUT_S)

    def restart(self, role: "admin_pb2.ProcessRole", rank: int) -> None:
        """Another process is to take that one's place. Returns when it is decided."""
        self._stub.Restart(admin_pb2.RestartRequest(role=role, rank=rank), timeout=REBALANCE_TIMEOUT_S)
