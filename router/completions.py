"""Forwards from the moment they are sent until their end is told, and where the engine thread waits for that.

A forward's end: an answer, or the error for which there is none. It may come up in any thread; it is told in the engine
thread alone. Knows nothing of what is retried or added.
"""

import ctypes
from collections import deque
from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from protos import expert_pb2
from protos.codec import write_frame
from protos.errors import MobulaError
from protos.memory import Memory
from protos.poller import Poller
from router.plan import ShardMessage
from router.plan_kernels import write_payload


class Carrier(StrEnum):
    """What a forward's bytes travel on."""

    LOCAL = "local"
    GRPC = "grpc"
    RING = "ring"


def _nothing() -> None:
    pass


class ForwardAnswer(NamedTuple):
    """A shard's answer. The payload may be shared memory: whoever is told calls `release` once when done with it."""

    header: expert_pb2.ForwardResult
    payload: Memory
    release: Callable[[], None] = _nothing  # in the engine thread


Outcome = ForwardAnswer | MobulaError


class Completions:
    """The ends that the engine thread has yet to be told."""

    def __init__(self, poller: Poller) -> None:
        self._poller = poller
        self._ended: deque[tuple[ForwardCall, Outcome]] = deque()

    def put(self, call: "ForwardCall", outcome: Outcome) -> None:
        """From any thread."""
        self._ended.append((call, outcome))
        self._poller.wake()

    def wait(self, timeout_s: float) -> bool:
        """Tells what has ended, whichever layer it belongs to; when nothing has, waits for it.

        Whether there was anything to tell: if not, nothing has ended that has not been told.
        """
        had_any = bool(self._ended) or self._poller.poll(timeout_s)
        while self._ended:
            had_any = True
            call, outcome = self._ended.popleft()
            call.tell(outcome)
        return had_any


class ForwardCall:
    """One forward to one shard. A transport sends it and ends it once.

    Attributes:
        header: a serialised ForwardHeader that has `sequence_number`.
        hidden_states: [num_tokens, hidden_size], contiguous, on the CPU.
        message: which of them are sent, and with what.
        answer_bytes: of the answer's payload, unless it is an error.
        carrier: who carries it; set by the transport.
        is_given_up: nobody waits any more; its end may still be told, and is ignored.
    """

    __slots__ = (
        "_completions",
        "answer_bytes",
        "carrier",
        "header",
        "hidden_states",
        "is_given_up",
        "message",
        "payload_bytes",
        "sequence_number",
        "tell",
    )

    def __init__(
        self,
        *,
        sequence_number: int,
        header: bytes,
        hidden_states: Tensor,
        message: ShardMessage,
        answer_bytes: int,
        completions: Completions,
        tell: Callable[[Outcome], None],
    ) -> None:
        """tell: called once with the end, in the thread that waits on `completions`."""
        self.sequence_number = sequence_number
        self.header = header
        self.hidden_states = hidden_states
        self.message = message
        row_bytes = hidden_states.shape[1] * hidden_states.itemsize
        self.payload_bytes = message.num_rows * row_bytes + 16 * message.num_assignments
        self.answer_bytes = answer_bytes
        self.tell = tell
        self.carrier = Carrier.LOCAL
        self.is_given_up = False
        self._completions = completions

    @property
    def sent_bytes(self) -> int:
        """Header and payload."""
        return len(self.header) + self.payload_bytes

    def frame(self) -> bytes:
        """As a ForwardRequest."""
        return write_frame(self.header, self.payload_bytes, self.write_payload)

    def cancellation(self) -> bytes:
        """The serialised header that takes the call back."""
        header = expert_pb2.ForwardHeader(sequence_number=self.sequence_number, is_cancellation=True)
        return header.SerializeToString()

    def write_payload(self, address: int) -> None:
        """Puts the payload to memory of its size."""
        message = self.message
        if write_payload(self.hidden_states, message, address):
            return
        to = np.ctypeslib.as_array((ctypes.c_uint8 * self.payload_bytes).from_address(address))
        rows = self._hidden_bytes()
        num_bytes = message.num_rows * rows.shape[1]
        # The row ids are right; "raise" would copy twice.
        rows.take(message.row_ids, axis=0, out=to[:num_bytes].reshape(message.num_rows, rows.shape[1]), mode="clip")
        to[num_bytes:] = message.assignments.view(np.uint8).ravel()

    def _hidden_bytes(self) -> npt.NDArray[np.uint8]:
        """[num_tokens, row bytes], in place; numpy knows no bfloat16."""
        return self.hidden_states.view(torch.uint8).numpy()

    def end(self, outcome: Outcome) -> None:
        """From any thread. The answer's payload stays as it is."""
        self._completions.put(self, outcome)
