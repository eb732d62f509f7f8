"""The gateway's HTTP port: the page, its state as JSON, and what Prometheus asks for. No logic.

Everything that the page needs comes from here; its content security policy forbids any other source.
"""

import gzip
import json
from collections.abc import Callable, Iterable
from importlib.resources import files
from typing import Any, Protocol
from urllib.parse import parse_qs
from wsgiref.types import StartResponse, WSGIEnvironment

from prometheus_client import make_wsgi_app

from cluster.dashboard.discovery import OWN_PATH, scrape_targets
from cluster.gateway.metrics import GatewayMetrics

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


class DashboardState(Protocol):
    """What the page shows: cluster.dashboard.dashboard.Dashboard."""

    def state(self, known_placement_version: int, last_event: int) -> dict[str, Any]:
        """As JSON has it."""


class GatewayApp:
    """A WSGI application. The page's files are read once."""

    def __init__(self, metrics: GatewayMetrics, dashboard: DashboardState | None) -> None:
        """dashboard: None for no page."""
        self._pages = {"/metrics": make_wsgi_app(metrics.of_all), OWN_PATH: make_wsgi_app(metrics.registry)}
        self._processes = metrics.processes
        self._dashboard = dashboard
        files = PAGE.iterdir() if dashboard else ()
        self._files = {f"/{file.name}": file.read_bytes() for file in files if _content_type(file.name)}

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if (page := self._pages.get(path)) is not None:
            answer: Iterable[bytes] = page(environ, start_response)
            return answer
        respond = _responder(environ, start_response)
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return respond("405 Method Not Allowed", "text/plain", b"only GET\n")
        if path == "/sd":
            own = environ.get("HTTP_HOST") or f"{environ['SERVER_NAME']}:{environ['SERVER_PORT']}"
            scheme = "https" if self._processes.make_context else "http"
            targets = scrape_targets(own, self._processes.targets, scheme)
            return respond("200 OK", "application/json", json.dumps(targets).encode())
        if path == "/api/state" and self._dashboard:
            return self._state(self._dashboard, environ, respond)
        name = "/index.html" if path == "/" else path
        if name not in self._files:
            of_dashboard = "/, /api/state, " if self._dashboard else ""
            return respond("404 Not Found", "text/plain", f"here are {of_dashboard}/metrics and /sd\n".encode())
        return respond("200 OK", _content_type(name), self._files[name])

    def _state(self, dashboard: DashboardState, environ: WSGIEnvironment, respond: "Respond") -> Iterable[bytes]:
        query = parse_qs(environ.get("QUERY_STRING", ""))
        try:
            known, last_event = (int(query.get(name, ["0"])[-1]) for name in ("placement", "event"))
        except ValueError:
            return respond("400 Bad Request", "text/plain", b"placement and event are whole numbers\n")
        body = json.dumps(dashboard.state(known, last_event), separators=(",", ":"), allow_nan=False).encode()
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
