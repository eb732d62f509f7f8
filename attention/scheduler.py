"""Which sequences run in the next step, and how many tokens of each. Plain accounting: no tensors, clock or threads.

There is no prefill phase and no decode phase: a sequence has `num_computed_tokens`, and a step computes some more of
the tokens that it knows. A step is filled in this order, under `max_num_batched_tokens`:

1. Running sequences that miss one token (decodes), oldest first. When a new block is needed and none is free, the
   latest-arrived running sequence gives all of its blocks back and waits again with its tokens kept. A sequence never
   takes blocks from an older one; it sits the step out instead. So the oldest one always advances, and each ends.
2. Running sequences that miss more (prefills), oldest first, in chunks.
3. Waiting sequences, first come, first served, none is passed over. A sequence is admitted when there are blocks for
   every token it knows, and gets them all at once: a prefill that has begun never lacks blocks.
"""

from collections import deque
from dataclasses import dataclass

from attention.block_manager import BlockManager
from attention.sequence import Sequence, SequenceStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledSequence:
    """A sequence's part of one step."""

    sequence: Sequence
    num_scheduled_tokens: int  # the tokens that follow num_computed_tokens
    block_table: tuple[int, ...]  # blocks for all tokens up to and including the scheduled ones

    @property
    def seq_len(self) -> int:
        """Context after the step, in tokens."""
        return self.sequence.num_computed_tokens + self.num_scheduled_tokens

    @property
    def needs_sample(self) -> bool:
        """Whether the step computes the last known token, so that the next one can be sampled."""
        return self.seq_len == self.sequence.num_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledBatch:
    """One step's work: at least one sequence."""

    sequences: tuple[ScheduledSequence, ...]

    @property
    def num_tokens(self) -> int:
        return sum(scheduled.num_scheduled_tokens for scheduled in self.sequences)


class Scheduler:
    """Orders sequences by arrival. Not thread-safe; the engine thread owns it."""

    def __init__(self, block_manager: BlockManager, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        if max_num_seqs < 1 or max_num_batched_tokens < 1:
            raise ValueError(
                f"max_num_seqs is {max_num_seqs} and max_num_batched_tokens is {max_num_batched_tokens}, "
                "both must be 1 or more"
            )
        self._block_manager = block_manager
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._waiting: deque[Sequence] = deque()  # by arrival: whatever was preempted is older than the rest
        self._running: list[Sequence] = []  # by arrival
        self._num_preemptions = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_preemptions(self) -> int:
        """Since the start."""
        return self._num_preemptions

    @property
    def has_unfinished(self) -> bool:
        return bool(self._waiting or self._running)

    def can_ever_run(self, sequence: Sequence) -> bool:
        """Whether the sequence at its longest fits the cache alone."""
        return sequence.max_num_tokens <= self._block_manager.max_num_tokens

    def add(self, sequence: Sequence) -> None:
        """Puts a new sequence at the end of the queue; `can_ever_run` must be true."""
        assert self.can_ever_run(sequence), f"{sequence.request_id} needs more blocks than there are"
        assert sequence.status is SequenceStatus.WAITING, f"{sequence.request_id} is {sequence.status}"
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Ends a sequence wherever it is, and frees its blocks. Of an ended one nothing is left to remove."""
        if sequence.is_finished:
            return
        (self._running if sequence.status is SequenceStatus.RUNNING else self._waiting).remove(sequence)
        self._block_manager.free(sequence)
        sequence.status = SequenceStatus.FINISHED

    def schedule(self) -> ScheduledBatch | None:
        """The next step, or None when there is nothing to compute.

        Allocates the blocks that the step writes; `commit` must follow once it is computed.
        """
        budget = self._max_num_batched_tokens
        scheduled: list[ScheduledSequence] = []
        for chooser in (self._schedule_decodes, self._schedule_prefills, self._admit_waiting):
            for sequence, num_tokens in chooser(budget):
                scheduled.append(self._scheduled(sequence, num_tokens))
                budget -= num_tokens
        return ScheduledBatch(sequences=tuple(scheduled)) if scheduled else None

    def commit(self, batch: ScheduledBatch) -> None:
        """Records that the step was computed. Call it before sampled tokens are added to the sequences."""
        for scheduled in batch.sequences:
            scheduled.sequence.num_computed_tokens += scheduled.num_scheduled_tokens

    def _schedule_decodes(self, budget: int) -> list[tuple[Sequence, int]]:
        chosen: list[tuple[Sequence, int]] = []
        for sequence in [running for running in self._running if running.num_uncomputed_tokens == 1]:
            if len(chosen) == budget:
                break
            if sequence.status is SequenceStatus.RUNNING and self._make_room(sequence):
                chosen.append((sequence, 1))
        return chosen

    def _schedule_prefills(self, budget: int) -> list[tuple[Sequence, int]]:
        chosen: list[tuple[Sequence, int]] = []
        for sequence in self._running:
            if sequence.num_uncomputed_tokens > 1 and budget > 0:
                num_tokens = min(sequence.num_uncomputed_tokens, budget)
                chosen.append((sequence, num_tokens))
                budget -= num_tokens
        return chosen

    def _admit_waiting(self, budget: int) -> list[tuple[Sequence, int]]:
        chosen: list[tuple[Sequence, int]] = []
        while self._waiting and budget > 0 and len(self._running) < self._max_num_seqs:
            sequence = self._waiting[0]
            if not self._block_manager.can_allocate(sequence, sequence.num_tokens):
                break
            self._waiting.popleft()
            self._block_manager.allocate(sequence, sequence.num_tokens)
            sequence.status = SequenceStatus.RUNNING
            self._running.append(sequence)
            num_tokens = min(sequence.num_uncomputed_tokens, budget)
            chosen.append((sequence, num_tokens))
            budget -= num_tokens
        return chosen

    def _make_room(self, sequence: Sequence) -> bool:
        """Allocates the last token's block, preempting later arrivals; False if only older ones are left."""
        while not self._block_manager.can_allocate(sequence, sequence.num_tokens):
            latest = self._running[-1]
            if latest is sequence:
                return False
            self._preempt(latest)
        self._block_manager.allocate(sequence, sequence.num_tokens)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        assert self._running[-1] is sequence, "only the latest arrival is preempted"
        self._running.pop()
        self._block_manager.free(sequence)
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        sequence.status = SequenceStatus.WAITING
        self._waiting.appendleft(sequence)
        self._num_preemptions += 1

    def _scheduled(self, sequence: Sequence, num_tokens: int) -> ScheduledSequence:
        return ScheduledSequence(
            sequence=sequence, num_scheduled_tokens=num_tokens, block_table=self._block_manager.block_table(sequence)
        )
