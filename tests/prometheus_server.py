"""A real Prometheus and Alertmanager on loopback. Tests that want them are skipped, with the reason, without them."""

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class HttpApi:
    """A server's."""

    address: str

    def get(self, path: str, **query: str) -> Any:
        """The JSON at a path. Raises AssertionError with what the server says is wrong."""
        url = f"http://{self.address}{path}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=10.0) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{query}: {error.read().decode()}") from error

    def query(self, expression: str) -> list[dict[str, Any]]:
        """PromQL's answer now: a list of {metric, value}."""
        results: list[dict[str, Any]] = self.get("/api/v1/query", query=expression)["data"]["result"]
        return results

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.address}/-/ready", timeout=2.0) as response:
                return bool(response.status == 200)
        except OSError:
            return False


@contextmanager
def prometheus(folder: Path, config: dict[str, Any]) -> Iterator[HttpApi]:
    """One that scrapes what the config says."""
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    options = (f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb", "--log.level=warn")
    with _server("prometheus", "--web.listen-address", (*options, "--rules.alert.resend-delay=1s")) as api:
        yield api


@contextmanager
def alertmanager(folder: Path) -> Iterator[HttpApi]:
    """One that keeps what it is told."""
    (folder / "am.yml").write_text(yaml.safe_dump({"route": {"receiver": "none"}, "receivers": [{"name": "none"}]}))
    options = (f"--config.file={folder}/am.yml", f"--storage.path={folder}/am", "--cluster.listen-address=")
    with _server("prometheus-alertmanager", "--web.listen-address", options) as api:
        yield api


@contextmanager
def _server(name: str, listen: str, options: tuple[str, ...]) -> Iterator[HttpApi]:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not on this machine; Debian has a package of that name")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    process = subprocess.Popen(
        [path, f"{listen}={address}", *options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    api = HttpApi(address)
    try:
        give_up_s = time.monotonic() + TIMEOUT_S
        while not api.is_ready():
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < give_up_s, f"{name} is not ready after {TIMEOUT_S} s"
            time.sleep(0.05)
        yield api
    finally:
        process.terminate()
        process.communicate(timeout=10.0)
