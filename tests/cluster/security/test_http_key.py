"""The HTTP port behind a key."""

import base64
from pathlib import Path
from wsgiref.util import setup_testing_defaults

import pytest
from prometheus_client import CollectorRegistry, make_wsgi_app

from cluster.security.http_key import KeyedApp
from cluster.security.key_guard import KeyCheck
from cluster.security.keys import KeyFile, KeyRing, Right, new_key, write_keys
from cluster.security.metrics import KeyMetrics


class Port:
    """Of a gateway with one operator's key and one user's."""

    def __init__(self, path: Path) -> None:
        operator, self.operator = new_key("operator", frozenset(Right))
        user, self.user = new_key("user", frozenset({Right.GENERATE}))
        write_keys(path, KeyFile(keys=(operator, user)))
        self.registry = CollectorRegistry()
        self._app = KeyedApp(make_wsgi_app(self.registry), KeyCheck(KeyRing(path), KeyMetrics(self.registry)))

    def get(self, authorization: str | None) -> tuple[str, bytes]:
        environ = {} if authorization is None else {"HTTP_AUTHORIZATION": authorization}
        setup_testing_defaults(environ)
        answers: list[str] = []
        body = b"".join(self._app(environ, lambda status, headers, error=None: answers.append(status)))  # type: ignore[arg-type]
        return answers[0], body


@pytest.fixture
def port(tmp_path: Path) -> Port:
    return Port(tmp_path / "keys.json")


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


def test_an_operators_key_opens_it_as_bearer_and_as_a_password(port: Port) -> None:
    for shown in (f"Bearer {port.operator}", f"bearer {port.operator}", basic(f"anyone:{port.operator}")):
        status, body = port.get(shown)
        assert status == "200 OK"
        assert b"mobula_key_refusals" in body


def test_anything_else_does_not(port: Port) -> None:
    for shown in (None, "", "Basic !", "Basic", basic("no colon"), basic("operator:wrong"), "Bearer operator.wrong"):
        status, body = port.get(shown)
        assert status == "401 Unauthorized"
        assert b"mobula" not in body
    assert port.get(f"Bearer {port.user}") == (
        "403 Forbidden",
        b"key user has not the right that this needs: admin\n",
    )
    assert port.registry.get_sample_value("mobula_key_refusals_total", {"reason": "right"}) == 1
