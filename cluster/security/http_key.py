"""Lets HTTP requests through when they show a key with the right `admin`: as a Bearer token, which Prometheus can send,
or as the password of Basic authentication, for which browsers ask.
"""

import base64
import binascii
from collections.abc import Iterable
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from cluster.security.key_guard import KeyCheck
from cluster.security.keys import Right
from protos.errors import MobulaError, PermissionDenied, Unauthenticated

BASIC = "basic "


class KeyedApp:
    """A WSGI application before another one."""

    def __init__(self, app: WSGIApplication, keys: KeyCheck) -> None:
        self._app = app
        self._keys = keys

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        shown = environ.get("HTTP_AUTHORIZATION")
        try:
            self._keys.require([] if shown is None else [_as_bearer(shown)], Right.ADMIN)
        except (Unauthenticated, PermissionDenied) as error:
            return _refuse(error, start_response)
        return self._app(environ, start_response)


def _as_bearer(shown: str) -> str:
    if shown[: len(BASIC)].lower() != BASIC:
        return shown
    try:
        _, _, password = base64.b64decode(shown[len(BASIC) :], validate=True).decode("latin-1").partition(":")
    except binascii.Error:
        return shown
    return f"Bearer {password}"


def _refuse(error: MobulaError, start_response: StartResponse) -> Iterable[bytes]:
    status = "403 Forbidden" if isinstance(error, PermissionDenied) else "401 Unauthorized"
    body = f"{error}\n".encode()
    headers = [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body)))]
    start_response(status, [*headers, ("WWW-Authenticate", 'Basic realm="mobula"')])
    return [body]
