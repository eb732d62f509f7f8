"""The gateway's HTTP port: the page, its state as JSON, and the Prometheus endpoint. No logic.

Everything that the page needs comes from here; its content security policy forbids any other source.
"""

import gzip
import json
from collections.abc import Callable, Iterable
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from cluster.dashboard.dashboard import Dashboard

PAGE = files("cluster.dashboard") / "page"
CONTENT_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
GZIP_LEVEL = 1  # the state shrinks to a third in a millisecond; more costs more than it saves


class DashboardApp:
    """A WSGI application over files that were read once."""

    def __init__(self, dashboard: Dashboard, metrics: WSGIApplication) -> None:
        self._dashboard = dashboard
        self._metrics = metrics
        self._files = {f"/{file.name}": file.read_bytes() for file in PAGE.iterdir() if _content_type(file.name)}

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            return self._metrics(environ, start_response)
        respond = _responder(environ, start_response)
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return respond("405 Method Not Allowed", "text/plain", b"only GET\n")
        if path == "/api/state":
            return self._state(environ, respond)
        name = "/index.html" if path == "/" else path
        if name not in self._files:
            return respond("404 Not Found", "text/plain", b"here are / and /metrics\n")
        return respond("200 OK", _content_type(name), self._files[name])

    def _state(self, environ: WSGIEnvironment, respond: "Respond") -> Iterable[bytes]:
        query = parse_qs(environ.get("QUERY_STRING", ""))
        try:
            known, last_event = (int(query.get(name, ["0"])[-1]) for name in ("placement", "event"))
        except ValueError:
            return respond("400 Bad Request", "text/plain", b"placement and event are whole numbers\n")
        state: dict[str, Any] = self._dashboard.state(known, last_event)
        body = json.dumps(state, separators=(",", ":"), allow_nan=False).encode()
        return respond("200 OK", "application/json", body)


Respond = Callable[[str, str, bytes], Iterable[bytes]]


def _responder(environ: WSGIEnvironment, start_response: StartResponse) -> Respond:
    def respond(status: str, content_type: str, body: bytes) -> Iterable[bytes]:
        headers = [
            ("Content-Type", content_type),
            ("Cache-Control", "no-store"),
            ("Content-Security-Policy", POLICY),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
        ]
        if "gzip" in environ.get("HTTP_ACCEPT_ENCODING", ""):
            body = gzip.compress(body, GZIP_LEVEL)
            headers.append(("Content-Encoding", "gzip"))
        start_response(status, [*headers, ("Content-Length", str(len(body)))])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    return respond


def _content_type(name: str) -> str:
    return CONTENT_TYPES.get(name.rpartition(".")[2], "")
