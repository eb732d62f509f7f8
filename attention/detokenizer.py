"""Turns the tokens of one sequence into text as they come, and finds stop strings in it.

Whatever the tokens and however they arrive, the pieces together are what the tokenizer makes of all tokens at once, and
no piece ends within a character. Knows nothing of sampling or of the engine.

The `DecodeStream` of `tokenizers` is not used: it has no way to give back, at the end, bytes that never became a
character.
"""

from collections.abc import Sequence as Collection
from typing import Protocol

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_INCOMPLETE_CHARS = 3  # the bytes of an unfinished character show as up to this many replacement characters
_MAX_WINDOW_IDS = 24  # beyond, a window is cut though its text ends in no whole character
# What stays then. Each of the replacement characters is of 3 bytes at most, in which a decoder that begins within a
# character finds the next one, and a token with text has a byte or more.
_CUT_WINDOW_IDS = 3 * _MAX_INCOMPLETE_CHARS + 3


class TokenDecoder(Protocol):
    """The part of a tokenizer that is needed here; attention.tokenizer.Tokenizer has it."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """Text of the tokens; bytes that are not UTF-8 become replacement characters."""


class Detokenizer:
    """Text of one sequence, without its stop string. Implements attention.sequence.TextDecoder."""

    def __init__(
        self, token_decoder: TokenDecoder, *, stop: Collection[str] = (), skip_special_tokens: bool = True
    ) -> None:
        self._text = _IncrementalText(token_decoder, skip_special_tokens=skip_special_tokens)
        self._stop = _StopStrings(stop)

    @property
    def matched_stop(self) -> str | None:
        """The stop string that the text has reached; all later text is cut."""
        return self._stop.matched

    def push(self, token_id: int) -> str:
        """Text that is certain now: whole characters, and not the possible beginning of a stop string."""
        return self._stop.push(self._text.push(token_id))

    def flush(self) -> str:
        """Text that was held back; to be called once, after the last token."""
        return self._stop.push(self._text.flush()) + self._stop.flush()


class _IncrementalText:
    """Decodes a window of tokens that begins at a whole character, so that the work a token is constant.

    Where no character becomes whole for long it begins anywhere; tokens without text are not kept in it.
    The window keeps the tokens of the piece before, since some decoders treat the beginning of a text differently.
    """

    def __init__(self, token_decoder: TokenDecoder, *, skip_special_tokens: bool) -> None:
        self._token_decoder = token_decoder
        self._skip_special_tokens = skip_special_tokens
        self._window: list[int] = []
        self._text = ""  # of the window
        self._num_context_ids = 0  # tokens at the window's start whose text was given out before
        self._num_given_chars = 0  # characters of the window's text that were given out

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        if text == self._text and self._is_left_out(token_id):
            self._window.pop()
            return ""
        self._text = text
        num_incomplete = len(text) - len(text.rstrip(_REPLACEMENT))
        piece = text[self._num_given_chars : len(text) - min(num_incomplete, _MAX_INCOMPLETE_CHARS)]
        self._num_given_chars += len(piece)
        if piece and num_incomplete == 0:
            self._window = self._window[self._num_context_ids :]
            self._num_context_ids = len(self._window)
            self._text = self._decode(self._window)
            self._num_given_chars = len(self._text)
        elif len(self._window) > _MAX_WINDOW_IDS:
            num_held_chars = len(text) - self._num_given_chars
            self._window = self._window[-_CUT_WINDOW_IDS:]
            self._num_context_ids = 0
            self._text = self._decode(self._window)
            self._num_given_chars = len(self._text) - num_held_chars
        return piece

    def flush(self) -> str:
        piece = self._text[self._num_given_chars :]
        self._num_given_chars += len(piece)
        return piece

    def _is_left_out(self, token_id: int) -> bool:
        """Whether a token that added nothing never will: a text's first space adds nothing, but the next one does."""
        if self._decode([token_id]):  # more bytes of a character
            return False
        return bool(self._text or self._token_decoder.decode([token_id], skip_special_tokens=False))

    def _decode(self, token_ids: list[int]) -> str:
        return self._token_decoder.decode(token_ids, skip_special_tokens=self._skip_special_tokens)


class _StopStrings:
    """Finds the stop string that ends first in a text that comes in pieces (Knuth, Morris and Pratt's automaton)."""

    def __init__(self, stop: Collection[str]) -> None:
        self._stop = tuple(stop)
        self._borders = [_borders(text) for text in self._stop]
        self._num_matched = [0] * len(self._stop)  # of each stop string, characters that end the text so far
        self._held = ""  # the longest end of the text that may become a stop string
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """What of the text is certainly not part of a stop string; nothing once one was found."""
        if self.matched is not None:
            return ""
        if not self._stop:
            return text
        text = self._held + text
        for position in range(len(self._held), len(text)):
            for i in range(len(self._stop)):
                self._num_matched[i] = self._advance(i, text[position])
            found = [stop for stop, count in zip(self._stop, self._num_matched, strict=True) if count == len(stop)]
            if found:
                self.matched = max(found, key=len)
                self._held = ""
                return text[: position + 1 - len(self.matched)]
        num_held = max(self._num_matched)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held

    def _advance(self, i: int, char: str) -> int:
        count = self._num_matched[i]
        while count and self._stop[i][count] != char:
            count = self._borders[i][count - 1]
        return count + (self._stop[i][count] == char)


def _borders(text: str) -> list[int]:
    """For each prefix of the text, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(text)
    count = 0
    for i in range(1, len(text)):
        while count and text[i] != text[count]:
            count = borders[count - 1]
        count += text[i] == text[count]
        borders[i] = count
    return borders
