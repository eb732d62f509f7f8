"""How a client of the gateway protects its connection and says who it is.

The command line takes it from options or the environment; secrets never from arguments, which every user of a machine
can read: a key is in a file or in MOBULA_API_KEY.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from cluster.security.keys import KEY_ID
from protos.bounded_file import FileTooLarge, read_bounded, why_unreadable

TLS, TLS_CA, TLS_CERT, TLS_KEY = "MOBULA_TLS", "MOBULA_TLS_CA", "MOBULA_TLS_CERT", "MOBULA_TLS_KEY"
API_KEY, API_KEY_FILE = "MOBULA_API_KEY", "MOBULA_API_KEY_FILE"
API_KEY_TEXT = re.compile(KEY_ID + r"\.[!-~]+")  # gRPC sends metadata in printable ASCII alone
MAX_FILE_BYTES = 1024 * 1024


class AccessError(Exception):
    """What was given cannot be used; the message names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientAccess:
    """Plaintext and nobody in particular, unless said otherwise.

    Attributes:
        is_tls: whether the connection is protected.
        authority: PEM of the authorities to believe; None for those that this machine believes.
        certificate, private_key: PEM, for gateways that want a client's certificate.
        api_key: for gateways that want a key.
    """

    is_tls: bool = False
    authority: bytes | None = None
    certificate: bytes | None = None
    private_key: bytes | None = field(default=None, repr=False)
    api_key: str | None = field(default=None, repr=False)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "ClientAccess":
        """Raises AccessError for what cannot be read or is no key, and for a certificate without its key."""
        authority, certificate, private_key, key_file = (
            _read(environment.get(name)) for name in (TLS_CA, TLS_CERT, TLS_KEY, API_KEY_FILE)
        )
        for name, content in ((TLS_CA, authority), (TLS_CERT, certificate)):
            if content is not None and b"-----BEGIN CERTIFICATE-----" not in content:
                raise AccessError(f"{environment[name]} holds no certificate in PEM form")
        if (certificate is None) != (private_key is None):
            raise AccessError(f"a certificate and its key go together: set both {TLS_CERT} and {TLS_KEY}, or neither")
        return cls(
            is_tls=authority is not None or certificate is not None or environment.get(TLS, "") not in ("", "0"),
            authority=authority,
            certificate=certificate,
            private_key=private_key,
            api_key=_api_key(environment, key_file),
        )

    def channel(self, address: str, options: Sequence[tuple[str, int]]) -> grpc.Channel:
        """To the gateway at "host:port"."""
        if self.is_tls:
            credentials = grpc.ssl_channel_credentials(self.authority, self.private_key, self.certificate)
            channel = grpc.secure_channel(address, credentials, options=options)
        else:
            channel = grpc.insecure_channel(address, options=options)
        return grpc.intercept_channel(channel, _ShowKey(self.metadata)) if self.metadata else channel

    def aio_channel(self, address: str, options: Sequence[tuple[str, int]]) -> grpc.aio.Channel:
        """The same for asyncio; `metadata` goes with every call."""
        if not self.is_tls:
            return grpc.aio.insecure_channel(address, options=options)
        credentials = grpc.ssl_channel_credentials(self.authority, self.private_key, self.certificate)
        return grpc.aio.secure_channel(address, credentials, options=options)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What shows the key."""
        return () if self.api_key is None else (("authorization", f"Bearer {self.api_key}"),)


class _ShowKey(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):  # type: ignore[misc]
    """Adds the key to every call."""

    def __init__(self, metadata: Sequence[tuple[str, str]]) -> None:
        self._metadata = metadata

    def intercept_unary_unary(self, call: Callable[..., Any], details: Any, request: Any) -> Any:
        return call(self._with_key(details), request)

    def intercept_unary_stream(self, call: Callable[..., Any], details: Any, request: Any) -> Any:
        return call(self._with_key(details), request)

    def _with_key(self, details: Any) -> Any:
        return details._replace(metadata=[*(details.metadata or ()), *self._metadata])


def _api_key(environment: Mapping[str, str], key_file: bytes | None) -> str | None:
    """The variable's before the file's. Raises AccessError, in which there is nothing of what may be a secret."""
    origin, text = API_KEY, environment.get(API_KEY)
    if not text:
        if key_file is None:
            return None
        origin, text = environment[API_KEY_FILE], key_file.decode("ascii", "replace")
    text = text.strip()
    if not API_KEY_TEXT.fullmatch(text):
        raise AccessError(f"{origin} holds no key, which is one line ID.SECRET")
    return text


def _read(path: str | None) -> bytes | None:
    if not path:
        return None
    try:
        return read_bounded(Path(path), MAX_FILE_BYTES)
    except (OSError, FileTooLarge) as error:
        raise AccessError(f"cannot read {path}: {why_unreadable(error)}") from error
