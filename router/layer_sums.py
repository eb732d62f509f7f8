"""The partial sums of one layer's plan: which have come, which are missing, and what they add up to.

Knows nothing of shards, times or retries. Answers stay where they came until `release`.
"""

from collections.abc import Iterable, Iterator

import numpy as np
from torch import Tensor

from router.attempt import Answer, Attempt, LayerInput
from router.completions import ForwardAnswer
from router.expert_map import Int64Array
from router.finite_check import confirmed_wrong, doubtful
from router.missing_experts import BoolArray, LeftOut, leave_out, renormalised
from router.plan import DispatchPlan, PartialSums, ShardMessage
from router.plan_kernels import sum_partials


class LayerSums:
    """Belongs to a handle. num_missing: partial sums of the plan."""

    def __init__(self, plan: DispatchPlan) -> None:
        self.num_missing = plan.num_partial_sums
        self._plan = plan
        self._answers: list[Answer] = []
        self._is_missing: BoolArray | None = None  # each of them; kept only once something was asked for twice
        self._left_out: LeftOut | None = None

    def take(self, attempt: Attempt, sums: PartialSums, answer: ForwardAnswer) -> None:
        """Keeps what is new in an answer, or was asked for as a check; else it is released."""
        num_new = len(sums.partial_sums)
        if attempt.is_check:
            num_new = 0
        elif self._is_missing is not None:
            num_new = int(self._is_missing[sums.partial_sums].sum())
            self._is_missing[sums.partial_sums] = False
        if not num_new and not attempt.is_check:
            answer.release()
            return
        self.num_missing -= num_new
        self._answers.append(Answer(attempt, sums, answer))

    def expect_twice(self) -> None:
        """From now on a partial sum may come more than once."""
        self._is_missing = self.missing()

    def has_all_of(self, message: ShardMessage) -> bool:
        """Whether others have answered what this message asks for."""
        return self._is_missing is not None and not self._is_missing[message.partial_sums].any()

    def missing(self) -> BoolArray:
        """Which partial sums are."""
        if self._is_missing is not None:
            return self._is_missing
        is_missing = np.ones(self._plan.num_partial_sums, dtype=np.bool_)
        for _, sums, _ in self._answers:
            is_missing[sums.partial_sums] = False
        return is_missing

    def do_without(self, messages: Iterable[ShardMessage], like: Tensor) -> int:
        """Leaves out all that is missing, which these messages have; how many assignments. like: [num_tokens, _]."""
        self._left_out = leave_out(messages, self.missing(), len(like), like)
        self.num_missing = 0
        return self._left_out.num_assignments

    def total(self, layer: LayerInput, *, renormalises: bool) -> Tensor:
        """[num_tokens, hidden_size] fp32. Of answers that came twice the newest counts.

        renormalises: what was left out gives its weight to the rest.
        """
        answers = [sums for _, sums, _ in self._answers]
        if self._left_out is None:
            return sum_partials(self._plan, answers, layer.hidden_states.shape[1])
        sums = sum_partials(self._plan, [*answers, self._left_out.zeros], layer.hidden_states.shape[1])
        return renormalised(sums, self._left_out, layer.topk_weights, layer.topk_ids) if renormalises else sums

    def doubts(self, hidden_states: Tensor) -> list[tuple[Attempt, Int64Array]]:
        """Attempts with partial sums that are not finite although their rows are, and which."""
        return [
            (attempt, partial_sums)
            for attempt, sums, _ in self._answers
            if len(partial_sums := doubtful(self._plan, sums, hidden_states))
        ]

    def wrong(self, doubts: Iterable[tuple[Attempt, Int64Array]]) -> Iterator[tuple[Attempt, Int64Array]]:
        """Those of the doubtful ones that checks have answered with numbers."""
        checks = [sums for attempt, sums, _ in self._answers if attempt.is_check]
        for attempt, partial_sums in doubts:
            yield attempt, confirmed_wrong(partial_sums, checks)

    def release(self) -> None:
        """What was answered is not needed any more."""
        for _, _, answer in self._answers:
            answer.release()
        self._answers.clear()
