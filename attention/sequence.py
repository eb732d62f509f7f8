"""One request inside the engine: its tokens, how far they are computed, and how it ended.

Knows nothing of blocks, tensors or text; text is made by the TextDecoder that the sequence carries.
"""

import math
from dataclasses import dataclass, field
from enum import StrEnum, unique
from typing import Protocol

from attention.sampling_params import SamplingParams


@unique
class SequenceStatus(StrEnum):
    """Where a sequence is. A preempted sequence waits again, with its tokens kept."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@unique
class FinishReason(StrEnum):
    """Why a sequence ended without an error."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Natural logarithms of probabilities before temperature."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob) in falling order, ties to the lower id


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceOutput:
    """What one step, or the end, of a sequence gives its listener. The last one is final."""

    token_ids: tuple[int, ...] = ()  # new tokens
    text: str = ""  # new text; may lag behind the tokens
    logprobs: tuple[TokenLogprobs, ...] = ()  # one per new token, when asked for
    finish_reason: FinishReason | None = None
    matched_stop: str | int | None = None  # the stop string or the stop token that ended the sequence
    error: Exception | None = None

    @property
    def is_final(self) -> bool:
        return self.finish_reason is not None or self.error is not None


class TextDecoder(Protocol):
    """Makes text of the tokens of one sequence; implemented by attention.detokenizer.Detokenizer."""

    @property
    def matched_stop(self) -> str | None:
        """The stop string that the text has reached."""

    def push(self, token_id: int) -> str:
        """Text that the next token makes certain."""

    def flush(self) -> str:
        """Text that was held back."""


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """Owned by the engine thread from Engine.submit on. Equal only to itself."""

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    max_num_tokens: int  # prompt and output together, never above max_model_len
    eos_token_ids: frozenset[int] = frozenset()
    text_decoder: TextDecoder | None = None  # None: the output has no text
    deadline_s: float = math.inf  # a moment of the monotonic clock: its client waits no longer

    output_token_ids: list[int] = field(default_factory=list)
    num_received_tokens: int = 0  # of them, that the client had when it asked
    ending: SequenceOutput | None = None  # of a sequence that ends with them: nothing is left to compute
    allows_missing_experts: bool = False  # rather than waiting for them; the deployment must allow it too
    is_abandoned: bool = False  # its client has left; set from any thread
    num_computed_tokens: int = 0  # leading tokens whose latents are in the cache
    status: SequenceStatus = SequenceStatus.WAITING
    num_preemptions: int = 0
    num_degraded_steps: int = 0  # in which experts were missing, of its own tokens or of others'
    num_dropped_assignments: int = 0  # left out by the overload valve, in all layers; recomputed tokens count again

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        """Known tokens whose latents are not in the cache: one for a sequence that decodes, more for a prefill."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Tokens start to stop (exclusive) of prompt and output together."""
        num_prompt_tokens = len(self.prompt_token_ids)
        if stop <= num_prompt_tokens:
            return self.prompt_token_ids[start:stop]
        outputs = self.output_token_ids[max(0, start - num_prompt_tokens) : stop - num_prompt_tokens]
        return [*self.prompt_token_ids[start:], *outputs] if start < num_prompt_tokens else outputs

    def advance(self, token_id: int, logprobs: TokenLogprobs | None = None) -> SequenceOutput:
        """Adds a sampled token; the output is final when the sequence ends with it.

        A token that ends the generation is reported but gives no text; a stop string gives none either.
        """
        self.output_token_ids.append(token_id)
        is_stop_token = token_id in self.sampling_params.stop_token_ids
        is_eos = token_id in self.eos_token_ids and not self.sampling_params.ignore_eos
        has_ended = is_stop_token or is_eos
        finish_reason = FinishReason.STOP if has_ended else None
        matched_stop: str | int | None = token_id if is_stop_token else None
        if finish_reason is None and self._has_reached_length:
            finish_reason = FinishReason.LENGTH
        text = ""
        if self.text_decoder is not None:
            text = "" if has_ended else self.text_decoder.push(token_id)
            if self.text_decoder.matched_stop is not None:
                finish_reason, matched_stop = FinishReason.STOP, self.text_decoder.matched_stop
            if finish_reason is not None:
                text += self.text_decoder.flush()
        return SequenceOutput(
            token_ids=(token_id,),
            text=text,
            logprobs=() if logprobs is None else (logprobs,),
            finish_reason=finish_reason,
            matched_stop=matched_stop,
        )

    @property
    def _has_reached_length(self) -> bool:
        return self.num_output_tokens >= self.sampling_params.max_tokens or self.num_tokens >= self.max_num_tokens
