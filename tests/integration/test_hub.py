"""Fetching from a stand-in of the Hugging Face hub on this machine. No hub is reached."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.checkpoints import write_checkpoint

REPO_ID, COMMIT = "reef/mobula-tiny", "0123456789abcdef0123456789abcdef01234567"
# A process of its own: huggingface_hub reads its environment when it is imported.
FETCH = """
import sys
from cluster.checkpoint.checkpoint import Checkpoint, InvalidCheckpoint

try:
    checkpoint = Checkpoint.open(sys.argv[1])
    decoder = checkpoint.model_config().decoder
    if "role" in sys.argv:
        checkpoint.check_role(decoder.expert_weight_shapes(3, 31))
        for name in decoder.expert_weight_shapes(3, 31):
            checkpoint.read(name)
    checkpoint.optional_file("chat_template.jinja")
except InvalidCheckpoint as error:
    print(f"refused: {error}")
"""


@dataclass
class Hub:
    """What the stand-in holds and what was asked of it."""

    folder: Path
    url: str = ""
    fetched: list[str] = field(default_factory=list)

    def run(self, *arguments: str, cache: Path, **environment: str) -> str:
        variables = (
            os.environ | {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"} | environment
        )
        command = [sys.executable, "-c", FETCH, *arguments]
        answer = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
        assert answer.returncode == 0, answer.stderr
        return answer.stdout


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    state = Hub(write_checkpoint(tmp_path / "published", "v2", num_shards=4))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(with_content=False)

        def do_GET(self) -> None:
            self._answer(with_content=True)

        def _answer(self, *, with_content: bool) -> None:
            repo_id, _, rest = self.path.lstrip("/").partition("/resolve/")
            path = state.folder / rest.partition("/")[2]
            error = "RepoNotFound" if repo_id != REPO_ID else "EntryNotFound"
            if repo_id != REPO_ID or not path.is_file():
                self.send_response(404)
                self.send_header("X-Error-Code", error)
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            content = path.read_bytes()
            self.send_response(200)
            self.send_header("ETag", f'"{path.name}-{len(content)}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if with_content:
                state.fetched.append(path.name)
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


def test_opening_fetches_no_weights(hub: Hub, tmp_path: Path) -> None:
    assert hub.run(REPO_ID, cache=tmp_path / "cache") == ""
    assert sorted(hub.fetched) == ["config.json", "model.safetensors.index.json"]


def test_a_role_fetches_the_files_that_hold_its_tensors_and_only_once(hub: Hub, tmp_path: Path) -> None:
    assert hub.run(REPO_ID, "role", cache=tmp_path / "cache") == ""
    weight_files = [name for name in hub.fetched if name.endswith(".safetensors")]
    index = json.loads((hub.folder / "model.safetensors.index.json").read_text())
    assert weight_files == [index["weight_map"]["model.layers.3.mlp.experts.31.up_proj.weight"]]
    hub.fetched.clear()
    assert hub.run(REPO_ID, "role", cache=tmp_path / "cache") == ""
    assert hub.fetched == []


def test_what_was_fetched_serves_without_the_hub(hub: Hub, tmp_path: Path) -> None:
    hub.run(REPO_ID, "role", cache=tmp_path / "cache")
    assert hub.run(REPO_ID, "role", cache=tmp_path / "cache", HF_HUB_OFFLINE="1") == ""


@pytest.mark.parametrize("replaced", ["model*", "model-*"], ids=["without an index", "beside an old index"])
def test_a_repository_with_a_single_file_serves_it(hub: Hub, tmp_path: Path, replaced: str) -> None:
    for path in hub.folder.glob(replaced):
        path.unlink()
    write_checkpoint(hub.folder, "v2")
    assert hub.run(REPO_ID, cache=tmp_path / "cache") == ""
    assert "model.safetensors" not in hub.fetched
    assert hub.run(REPO_ID, "role", cache=tmp_path / "cache") == ""
    assert hub.fetched.count("model.safetensors") == 1
    assert hub.run(REPO_ID, "role", cache=tmp_path / "cache", HF_HUB_OFFLINE="1") == ""


def test_a_repository_that_is_not_there_is_refused_by_name(hub: Hub, tmp_path: Path) -> None:
    answer = hub.run("reef/nothing", cache=tmp_path / "cache")
    assert answer.startswith("refused: reef/nothing: no such folder here, and no such repository on the hub")


def test_without_hub_and_without_cache_the_error_says_what_to_do(hub: Hub, tmp_path: Path) -> None:
    answer = hub.run(REPO_ID, cache=tmp_path / "cache", HF_HUB_OFFLINE="1")
    assert answer.startswith(f"refused: {REPO_ID}: model.safetensors.index.json is neither in the local cache")
    assert "HF_ENDPOINT" in answer


def test_a_hub_that_cannot_be_reached_is_told_within_seconds(hub: Hub, tmp_path: Path) -> None:
    begun_s = time.monotonic()
    answer = hub.run(REPO_ID, cache=tmp_path / "cache", HF_ENDPOINT="http://127.0.0.1:1")
    assert "neither in the local cache nor could the hub be reached within 4 s" in answer
    assert time.monotonic() - begun_s < 20.0  # mostly imports; huggingface_hub alone would try again for 31 s
    assert hub.run(REPO_ID, "role", cache=tmp_path / "cache") == ""
    assert hub.run(REPO_ID, "role", cache=tmp_path / "cache", HF_ENDPOINT="http://127.0.0.1:1") == ""


def test_a_weight_file_that_the_index_names_and_the_repository_lacks_is_named(hub: Hub, tmp_path: Path) -> None:
    (hub.folder / "model-00004-of-00004.safetensors").unlink()
    answer = hub.run(REPO_ID, "role", cache=tmp_path / "cache")
    assert "the repository has no file model-00004-of-00004.safetensors" in answer
