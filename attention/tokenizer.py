"""Text and chats to token ids and back, from the tokenizer files of a published checkpoint.

Reads tokenizer.json, tokenizer_config.json, chat_template.jinja, generation_config.json and config.json. Never adds the
beginning-of-sequence token twice: a chat template writes it itself. Safe to use from several threads.
"""

import json
import logging
from pathlib import Path
from typing import Any

import jinja2
import tokenizers

from attention.chat_template import ChatTemplate
from protos import errors
from protos.bounded_file import read_bounded, why_unreadable

MAX_TOKENIZER_BYTES = 256 * 1024 * 1024  # of tokenizer.json; published ones have up to 40 MB
MAX_FILE_BYTES = 16 * 1024 * 1024  # of each other file
MAX_TOKEN_ID = 2**31 - 1

logger = logging.getLogger(__name__)

ChatMessages = list[dict[str, str]]


class BadTokenizer(ValueError):
    """The checkpoint's tokenizer files are missing or make no sense."""


class NoChatTemplate(errors.InvalidRequest):
    """A chat was sent to a model that has no chat template."""

    reason = "NO_CHAT_TEMPLATE"


class ChatTemplateRefused(errors.InvalidRequest):
    """The model's chat template does not accept these messages."""

    reason = "CHAT_TEMPLATE_REFUSED"


class Tokenizer:
    """One checkpoint's tokenizer, chat template and end-of-sequence tokens."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        special_tokens: dict[str, str],
        adds_bos: bool = False,
        chat_template: str | None = None,
        eos_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        """special_tokens: texts by name, as chat templates know them: bos_token, eos_token and so on."""
        self._tokenizer = tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._special_tokens = special_tokens
        bos_token = special_tokens.get("bos_token")
        self._bos_token_id = None if bos_token is None else tokenizer.token_to_id(bos_token)
        self._adds_bos = adds_bos
        self._chat_template = None if chat_template is None else _compile(chat_template)
        self._eos_token_ids = eos_token_ids
        # Byte-level tokens are written with one character a byte, so none stands for more characters of text than this.
        self.max_token_chars = max((len(token) for token in tokenizer.get_vocab(with_added_tokens=True)), default=1)

    @classmethod
    def read(cls, folder: Path, vocab_size: int | None = None) -> "Tokenizer":
        """vocab_size: the model's, where it is known: others of its end tokens end nothing.

        Raises BadTokenizer when a file is missing or cannot be understood.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise BadTokenizer(f"{path} does not exist; a checkpoint needs it, with tokenizer_config.json beside it")
        config = _read_json(folder / "tokenizer_config.json")
        try:
            tokenizer = tokenizers.Tokenizer.from_buffer(read_bounded(path, MAX_TOKENIZER_BYTES))
        except Exception as error:  # the library raises bare Exception, with what is wrong as its text
            raise BadTokenizer(f"{path} is not a tokenizer: {error}") from error
        special_tokens = _special_tokens(config)
        return cls(
            tokenizer,
            special_tokens=special_tokens,
            adds_bos=bool(config.get("add_bos_token", False)),
            chat_template=_read_chat_template(folder, config),
            eos_token_ids=_read_eos_token_ids(folder, tokenizer, special_tokens, vocab_size),
        )

    @property
    def vocab_size(self) -> int:
        """Tokens that have a text; a model's vocab_size may be larger."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return self._eos_token_ids

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def encode_text(self, text: str) -> list[int]:
        """Token ids, with the beginning-of-sequence token in front if the model wants it and the text lacks it."""
        ids = self._encode(text, add_special_tokens=True)
        if self._bos_token_id is None:
            return ids
        if ids[:2] == [self._bos_token_id] * 2:
            return ids[1:]
        return [self._bos_token_id, *ids] if self._adds_bos and ids[:1] != [self._bos_token_id] else ids

    def encode_chat(self, messages: ChatMessages) -> list[int]:
        """Token ids of the chat, ready for the assistant's answer. messages: each with "role" and "content".

        Raises NoChatTemplate, ChatTemplateRefused.
        """
        return self._encode(self.render_chat(messages), add_special_tokens=False)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """As a batch of one: `encode` keeps the interpreter's lock, for most of a second with a megabyte of text, and a
        process that cannot say that it is well meanwhile is taken for a silent one."""
        ids: list[int] = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def render_chat(self, messages: ChatMessages) -> str:
        """The chat's text, as encode_chat encodes it."""
        if self._chat_template is None:
            raise NoChatTemplate("the model has no chat template; send text or token_ids", field="chat")
        try:
            return self._chat_template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, **self._special_tokens
            )
        except jinja2.TemplateError as error:
            raise ChatTemplateRefused(
                f"the model's chat template refuses the messages: {error}; change their roles or order", field="chat"
            ) from error

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """Text of the tokens; bytes that are not UTF-8 become replacement characters, unknown ids nothing."""
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def token_texts(self, token_ids: list[int]) -> list[str]:
        """The text of each token on its own."""
        return [self.decode([token_id], skip_special_tokens=False) for token_id in token_ids]


def _compile(chat_template: str) -> ChatTemplate:
    try:
        return ChatTemplate(chat_template)
    except jinja2.TemplateError as error:
        raise BadTokenizer(f"the chat template is not valid jinja: {error}") from error


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Texts of the special tokens; published files give a text or an object with the text as its content."""
    texts: dict[str, str] = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = config.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            texts[name] = token
    return texts


def _read_chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The template of chat_template.jinja, else of the config: a text, or the one named default in a list."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return read_bounded(path, MAX_FILE_BYTES).decode("utf-8")
        except (OSError, ValueError) as error:
            raise BadTokenizer(f"{path} cannot be read: {why_unreadable(error)}") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    if template is not None and not isinstance(template, str):
        raise BadTokenizer(f"chat_template in {folder / 'tokenizer_config.json'} is neither a text nor a list")
    return template


def _read_eos_token_ids(
    folder: Path, tokenizer: tokenizers.Tokenizer, special_tokens: dict[str, str], vocab_size: int | None
) -> frozenset[int]:
    """Whatever generation_config.json, config.json or the tokenizer call end of sequence.

    Without those that the model can never draw: where a vocabulary was pruned, the old id is often left.
    """
    found = {name: _eos_token_ids(folder / name) for name in ("generation_config.json", "config.json")}
    if "eos_token" in special_tokens:
        token_id = tokenizer.token_to_id(special_tokens["eos_token"])
        found["tokenizer.json"] = [] if token_id is None else [token_id]
    for name, token_ids in found.items():
        for token_id in token_ids:
            if vocab_size is not None and token_id >= vocab_size:
                logger.warning(
                    "%s: end token %d is outside the vocabulary of %d tokens: it ends no answer",
                    folder / name,
                    token_id,
                    vocab_size,
                )
    every = {token_id for token_ids in found.values() for token_id in token_ids}
    return frozenset(token_id for token_id in every if vocab_size is None or token_id < vocab_size)


def _eos_token_ids(path: Path) -> list[int]:
    """Of config.json or generation_config.json: one id, several or none."""
    value = _read_json(path).get("eos_token_id")
    token_ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token_id) is int and 0 <= token_id <= MAX_TOKEN_ID for token_id in token_ids):
        raise BadTokenizer(f"{path}: eos_token_id is {repr(value)[:80]}, must be a token id or a list of them")
    return token_ids


def _read_json(path: Path) -> dict[str, Any]:
    """The file's object; an empty one when there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(read_bounded(path, MAX_FILE_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise BadTokenizer(f"{path} is not JSON: {why_unreadable(error)}") from error
    if not isinstance(value, dict):
        raise BadTokenizer(f"{path} holds a {type(value).__name__}, not an object")
    return value
