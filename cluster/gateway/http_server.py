"""A process's HTTP port: a small WSGI server whose connections are bounded in number and time, over TLS if it is given
certificates. Knows nothing of what is served.
"""

import http.client
import logging
import socket
import ssl
import sys
import threading
from collections.abc import Callable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.types import WSGIApplication

from protos.errors import Unavailable

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 64  # at once; more are closed
TIMEOUT_S = 10.0  # for a handshake, and between two parts of a request

Secure = Callable[[socket.socket], ssl.SSLSocket]


class _HttpServer(ThreadingMixIn, WSGIServer):
    """A thread a connection."""

    daemon_threads = True
    request_queue_size = 128  # connections that wait to be accepted; the default of 5 makes bursts wait for seconds
    secure: Secure | None = None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._places = threading.Semaphore(MAX_CONNECTIONS)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._places.acquire(blocking=False):
            arguments = (request, client_address)
            threading.Thread(target=self.process_request_thread, args=arguments, name="http-call", daemon=True).start()
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def finish_request(self, request: Any, client_address: Any) -> None:
        """In the connection's thread: who connects and says nothing keeps nobody else waiting."""
        request.settimeout(TIMEOUT_S)
        if self.secure is None:
            super().finish_request(request, client_address)
            return
        with self.secure(request) as secured:
            super().finish_request(secured, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client's fault, most often: no certificate, or gone."""
        logger.info("an HTTP connection from %s failed: %s", client_address[0], sys.exception())


class _QuietHandler(WSGIRequestHandler):
    """Writes no line for each scrape, nor for each piece of nonsense: who knocks without rest cannot fill the disk."""

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Only where it is looked for."""
        logger.debug(format, *args)


def serve_http(host: str, port: int, app: WSGIApplication, secure: Secure | None = None) -> tuple[WSGIServer, int]:
    """Starts a process's HTTP port, in a thread of its own. Returns server and port.

    secure: makes TLS of each connection, and raises OSError for whom it refuses; None for plaintext. Raises Unavailable
    if the port is taken.
    """
    try:
        server = make_server(host, port, app, _HttpServer, _QuietHandler)
    except OSError as error:
        raise Unavailable(
            f"cannot serve metrics on {host}:{port}: {error.strerror}; set another metrics_port"
        ) from error
    server.secure = secure
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    return server, int(server.server_port)


def close_http(server: WSGIServer) -> None:
    """Frees the port within half a second; does not wait for it."""

    def close() -> None:
        server.shutdown()
        server.server_close()

    threading.Thread(target=close, name="http-end", daemon=True).start()


def get(address: str, path: str, timeout_s: float, max_bytes: int, tls: tuple[ssl.SSLContext, str] | None) -> bytes:
    """What "host:port" answers. tls: a context, and the name that the server's certificate must carry.

    Raises OSError, http.client.HTTPException.
    """
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=timeout_s)
    try:
        if tls is not None:
            context, name = tls
            plain = socket.create_connection((host.strip("[]"), int(port)), timeout_s)
            connection.sock = context.wrap_socket(plain, server_hostname=name)
        connection.request("GET", path)
        response = connection.getresponse()
        if response.status != http.client.OK:
            raise http.client.HTTPException(f"{response.status} {response.reason}")
        page = response.read(max_bytes)
        if response.length:  # http.client takes the end of a connection for the end of what was to come
            raise http.client.IncompleteRead(page, response.length)
        return page
    finally:
        connection.close()
