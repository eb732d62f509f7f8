"""Checkpoints that somebody made to do harm: refused with what is wrong, at once, in little memory."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cluster.checkpoint.checkpoint import Checkpoint, InvalidCheckpoint
from cluster.checkpoint.json_fields import MAX_FILE_BYTES, read_json_object

MAX_S = 5.0


@pytest.fixture(autouse=True)
def _at_once() -> object:
    started_s = time.monotonic()
    yield
    assert time.monotonic() - started_s < MAX_S


def write_header(folder: Path, header: bytes) -> None:
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))


def tensor(start: int, end: int) -> dict[str, object]:
    return {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}


HEADERS = {
    "overlapping tensors": (json.dumps({"a": tensor(0, 8), "b": tensor(4, 12)}).encode(), "begins within a"),
    "one tensor twice over another": (json.dumps({"a": tensor(0, 8), "w": tensor(0, 8)}).encode(), "begins within"),
    "a name twice": (b'{"w": %b, "w": %b}' % ((json.dumps(tensor(0, 8)).encode(),) * 2), "stands twice"),
    "a million dimensions": (
        json.dumps({"w": {"dtype": "U8", "shape": [2**62] * 100_000, "data_offsets": [0, 8]}}).encode(),
        "header broken",
    ),
    "NaN": (b'{"w": {"dtype": "U8", "shape": [NaN], "data_offsets": [0, 8]}}', "header broken"),
    "a number of a million digits": (
        b'{"w": {"dtype": "U8", "shape": [%b], "data_offsets": [0, 8]}}' % (b"9" * 1_000_000),
        "not JSON",
    ),
    "infinity": (b'{"w": {"dtype": "U8", "shape": [1e999], "data_offsets": [0, 8]}}', "header broken"),
    "true for a size": (b'{"w": {"dtype": "U8", "shape": [true], "data_offsets": [0, 1]}}', "header broken"),
    "nested for ever": (b'{"w":' + b"[" * 1_000_000, "not JSON"),
    "no UTF-8": (b'{"\xff\xfe": 1}', "not JSON"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_lies_is_refused(tmp_path: Path, case: str) -> None:
    header, words = HEADERS[case]
    write_header(tmp_path, header)
    with pytest.raises(InvalidCheckpoint, match=words) as raised:
        Checkpoint.open(tmp_path).shape("w")
    assert len(str(raised.value)) < 1000


def test_a_header_that_claims_to_be_huge_is_not_read(tmp_path: Path) -> None:
    for claimed in (2**63, 2**64 - 1, 10**9):
        (tmp_path / "model.safetensors").write_bytes(claimed.to_bytes(8, "little") + b"{}")
        with pytest.raises(InvalidCheckpoint, match=f"header of {claimed} bytes"):
            Checkpoint.open(tmp_path).shape("w")


JSON_FILES = {
    "nested for ever": (b"[" * 1_000_000, "not readable as JSON"),
    "a list": (b"[]", "holds a list"),
    "no UTF-8": (b'{"a": "\xff"}', "not readable as JSON"),
    "a number of a million digits": (b'{"vocab_size": ' + b"9" * 1_000_000 + b"}", "not readable as JSON"),
    "empty": (b"", "not readable as JSON"),
}


@pytest.mark.parametrize("case", JSON_FILES)
def test_json_that_is_none_is_refused_with_the_file(tmp_path: Path, case: str) -> None:
    data, words = JSON_FILES[case]
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(InvalidCheckpoint, match=rf"config\.json: .*{words}") as raised:
        Checkpoint.open(tmp_path).model_config()
    assert len(str(raised.value)) < 1000


def test_a_file_that_is_too_large_is_refused_by_its_size(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(InvalidCheckpoint, match=f"more than {MAX_FILE_BYTES} bytes"):
        read_json_object(path)


def link(path: Path, target: Path) -> None:
    path.symlink_to(target)


def fifo(path: Path, target: Path) -> None:
    import os

    os.mkfifo(path)


@pytest.mark.parametrize(
    ("make", "target", "words"),
    [
        (link, Path("/etc/hostname"), "is a link to /etc/hostname, outside the checkpoint"),
        (link, Path("/dev/zero"), "has no file"),
        (link, Path("config.json"), "has no file"),  # to itself
        (fifo, Path(), "has no file"),  # would be waited for
    ],
)
def test_a_file_that_is_none_of_the_folders_own_is_not_opened(
    tmp_path: Path, make: Callable[[Path, Path], None], target: Path, words: str
) -> None:
    make(tmp_path / "config.json", target)
    with pytest.raises(InvalidCheckpoint, match=words):
        Checkpoint.open(tmp_path).model_config()


def test_the_hubs_cache_and_links_within_the_folder_are_followed(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "c0ffee", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file({"w": torch.ones(2)}, blobs / "hash")
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs/hash"))
    assert Checkpoint.open(snapshot).shape("w") == (2,)
    (tmp_path / "by-name").symlink_to(snapshot)
    assert Checkpoint.open(tmp_path / "by-name").shape("w") == (2,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused_by_name_and_never_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch harm'\ntR.")
    with pytest.raises(InvalidCheckpoint, match=rf"only {name}: a pickle, which is a program; convert it"):
        Checkpoint.open(tmp_path).shape("w")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(InvalidCheckpoint, match=r"only \.safetensors files are read"):
        Checkpoint.open(tmp_path)
