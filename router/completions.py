"""Forwards from the moment they are sent until their end is told, and where the engine thread waits for that.

A forward's end: an answer, or the error for which there is none. It may come up in any thread; it is told in the engine
thread alone. Knows nothing of what is retried or added.
"""

from collections import deque
from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from protos import expert_pb2
from protos.codec import join_frame
from protos.errors import MobulaError
from protos.poller import Poller


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
    payload: memoryview
    release: Callable[[], None] = _nothing  # in the engine thread


Outcome = ForwardAnswer | MobulaError
Bytes = npt.NDArray[np.uint8]


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
        hidden_states: [num_tokens, row bytes] uint8, contiguous. row_ids: [num_rows] int64, those that are sent, or
            None for all of them.
        assignments: [4, num_assignments] int32, contiguous: weights (the bits of fp32), rows, expert ids, partial sums.
        answer_bytes: of the answer's payload, unless it is an error.
        carrier: who carries it; set by the transport.
        is_given_up: nobody waits any more; its end may still be told, and is ignored.
    """

    __slots__ = (
        "_completions",
        "answer_bytes",
        "assignments",
        "carrier",
        "header",
        "hidden_states",
        "is_given_up",
        "row_ids",
        "sequence_number",
        "tell",
    )

    def __init__(
        self,
        *,
        sequence_number: int,
        header: bytes,
        hidden_states: Bytes,
        row_ids: npt.NDArray[np.int64] | None,
        assignments: npt.NDArray[np.int32],
        answer_bytes: int,
        completions: Completions,
        tell: Callable[[Outcome], None],
    ) -> None:
        """tell: called once with the end, in the thread that waits on `completions`."""
        self.sequence_number = sequence_number
        self.header = header
        self.hidden_states = hidden_states
        self.row_ids = row_ids
        self.assignments = assignments
        self.answer_bytes = answer_bytes
        self.tell = tell
        self.carrier = Carrier.LOCAL
        self.is_given_up = False
        self._completions = completions

    @property
    def payload_bytes(self) -> int:
        """Of the request."""
        num_rows = len(self.hidden_states) if self.row_ids is None else len(self.row_ids)
        row_bytes: int = self.hidden_states.shape[1]
        return num_rows * row_bytes + self.assignments.nbytes

    @property
    def sent_bytes(self) -> int:
        """Header and payload."""
        return len(self.header) + self.payload_bytes

    def frame(self) -> bytes:
        """As a ForwardRequest."""
        rows = self.hidden_states if self.row_ids is None else self.hidden_states.take(self.row_ids, axis=0)
        return join_frame(self.header, (rows.data, self.assignments.data))

    def cancellation(self) -> bytes:
        """The serialised header that takes the call back."""
        header = expert_pb2.ForwardHeader(sequence_number=self.sequence_number, is_cancellation=True)
        return header.SerializeToString()

    def write_payload(self, memory: Bytes, offset: int) -> None:
        """Puts the payload into `memory` ([n] uint8) from `offset` on."""
        row_bytes = self.hidden_states.shape[1]
        num_rows = len(self.hidden_states) if self.row_ids is None else len(self.row_ids)
        end = offset + num_rows * row_bytes
        rows = memory[offset:end].reshape(num_rows, row_bytes)
        if self.row_ids is None:
            rows[...] = self.hidden_states
        else:
            self.hidden_states.take(self.row_ids, axis=0, out=rows, mode="clip")  # "raise" would copy twice
        memory[end : end + self.assignments.nbytes] = self.assignments.view(np.uint8).ravel()

    def end(self, outcome: Outcome) -> None:
        """From any thread. The answer's payload stays as it is."""
        self._completions.put(self, outcome)
