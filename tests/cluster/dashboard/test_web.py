"""The gateway's HTTP port, called as a function."""

from typing import Any
from wsgiref.util import setup_testing_defaults

import pytest

from cluster.dashboard.web import GatewayApp
from cluster.gateway.metrics import GatewayMetrics


class FakeDashboard:
    def state(self, known_placement_version: int, last_event: int) -> dict[str, Any]:
        return {}


def get(app: GatewayApp, path: str) -> tuple[str, bytes]:
    environ: dict[str, Any] = {"PATH_INFO": path}
    setup_testing_defaults(environ)
    statuses: list[str] = []
    body = b"".join(app(environ, lambda status, headers, error=None: statuses.append(status)))  # type: ignore[arg-type, return-value]
    return statuses[0], body


@pytest.mark.parametrize(
    ("dashboard", "paths"),
    [(FakeDashboard(), ["/", "/api/state", "/metrics", "/sd"]), (None, ["/metrics", "/sd"])],
)
def test_a_page_that_is_not_there_names_those_that_are(dashboard: FakeDashboard | None, paths: list[str]) -> None:
    app = GatewayApp(GatewayMetrics(), dashboard)
    *others, last = paths
    assert get(app, "/nothing") == ("404 Not Found", f"here are {', '.join(others)} and {last}\n".encode())
    for path in paths:
        assert get(app, path)[0] == "200 OK"
