"""The file of bearer keys: what each may do, until when, and a hash of its secret. `mobula keys` writes it.

A key is "ID.SECRET" with 256 random bits of secret. So many cannot be guessed, also not from a fast hash: SHA-256 is
enough, where passwords would need a slow one. The file never holds a secret. Knows nothing of gRPC.
"""

import datetime
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import threading
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from pydantic import AwareDatetime, BaseModel, Field, ValidationError

from cluster.security.private_file import replace_file
from protos.bounded_file import FileTooLarge, read_bounded

logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 4 * 1024 * 1024
MAX_KEYS = 10_000
SECRET_BYTES = 32
MAX_SECRET_CHARS = 128  # of what a client may show; ours have 43


class KeyFileError(Exception):
    """The file of keys cannot be used; the message says why."""


class Right(StrEnum):
    """What a key lets its holder do at the gateway. Health checks need none."""

    GENERATE = "generate"  # the Inference calls
    ADMIN = "admin"  # the Admin calls
    REFLECTION = "reflection"  # asking the server for its .proto files


KEY_ID = r"[a-z0-9][a-z0-9-]{0,31}"
KeyId = Annotated[str, Field(pattern=f"^{KEY_ID}$")]


class Key(BaseModel, frozen=True, extra="forbid"):
    """One entry of the file."""

    id: KeyId
    secret_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", repr=False)]
    rights: Annotated[frozenset[Right], Field(min_length=1)]
    expires: AwareDatetime | None = None
    is_revoked: bool = False
    max_concurrent_requests: Annotated[int, Field(ge=1)] | None = (
        None  # calls in flight in a gateway; None: no own limit
    )

    def is_expired(self, now: datetime.datetime) -> bool:
        return self.expires is not None and now >= self.expires

    def has_secret(self, secret: str) -> bool:
        """Takes as long whatever part of it is right."""
        return hmac.compare_digest(_hash(secret), self.secret_sha256)


class KeyFile(BaseModel, frozen=True, extra="forbid"):
    """All of them."""

    keys: Annotated[tuple[Key, ...], Field(max_length=MAX_KEYS)] = ()

    def by_id(self) -> dict[str, Key]:
        return {key.id: key for key in self.keys}


def new_key(key_id: str, rights: frozenset[Right], **limits: object) -> tuple[Key, str]:
    """An entry, and the text to give to its holder, which is kept nowhere. Raises KeyFileError for a bad id."""
    if not re.fullmatch(KEY_ID, key_id):
        raise KeyFileError(
            f"the id is {key_id!r}: take 1 to 32 lower-case letters, digits and hyphens, no hyphen first"
        )
    secret = secrets.token_urlsafe(SECRET_BYTES)
    data = {"id": key_id, "secret_sha256": _hash(secret), "rights": rights, **limits}
    try:
        return Key.model_validate(data), f"{key_id}.{secret}"
    except ValidationError as error:
        raise KeyFileError(_describe(error)) from error


def read_keys(path: Path) -> KeyFile:
    """Raises KeyFileError."""
    try:
        data = read_bounded(path, MAX_FILE_BYTES)
    except OSError as error:
        raise KeyFileError(f"cannot read the keys in {path}: {error.strerror}") from error
    except FileTooLarge as error:
        raise KeyFileError(str(error)) from error
    try:
        keys = KeyFile.model_validate_json(data)
    except ValidationError as error:
        raise KeyFileError(f"{path}: {_describe(error)}") from error
    if len(keys.by_id()) < len(keys.keys):
        raise KeyFileError(f"{path}: two keys have the same id")
    return keys


def write_keys(path: Path, keys: KeyFile) -> None:
    """Replaces the file as a whole, readable for its owner only. Raises KeyFileError."""
    data = keys.model_dump(mode="json", exclude_defaults=True)
    try:
        replace_file(path, json.dumps(data, indent=1).encode())
    except OSError as error:
        raise KeyFileError(f"cannot write the keys to {path}: {error.strerror}") from error


class KeyRing:
    """The newest usable state of a file of keys, read again when it changes. Any thread may ask."""

    def __init__(self, path: Path) -> None:
        """Raises KeyFileError."""
        self._path = path
        self._lock = threading.Lock()
        self._fault = ""
        self._signature = self._stat()
        self._keys = read_keys(path).by_id()

    def find(self, shown: str) -> Key | None:
        """The key of a text "ID.SECRET" if it is one; whether it may still be used is not asked."""
        key_id, _, secret = shown.partition(".")
        key = self._newest().get(key_id)
        if key is None or len(secret) > MAX_SECRET_CHARS or not key.has_secret(secret):
            return None
        return key

    def fault(self) -> str:
        """Why keys are used that the file no longer gives; "" if they are the file's. Looks at it anew."""
        self._newest()
        return self._fault

    def _newest(self) -> dict[str, Key]:
        with self._lock:
            signature = self._stat()
            if signature != self._signature:
                self._signature = signature
                try:
                    self._keys = read_keys(self._path).by_id()
                except KeyFileError as error:
                    self._fault = f"kept the keys that were read before: {error}"
                    logger.error("%s", self._fault)  # noqa: TRY400
                else:
                    self._fault = ""
                    logger.info("read %d keys in %s anew", len(self._keys), self._path)
            return self._keys

    def _stat(self) -> tuple[int, int, int] | None:
        try:
            status = os.stat(self._path)
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino


Clock = Callable[[], datetime.datetime]


def utc_now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def _describe(error: ValidationError) -> str:
    """Without what was given: it may be a secret in the wrong place."""
    return "; ".join(
        ": ".join(filter(None, (".".join(map(str, fault["loc"])), fault["msg"]))) for fault in error.errors()[:5]
    )
