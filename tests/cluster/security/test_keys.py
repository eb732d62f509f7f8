"""The file of keys: what it holds, what is noticed, what is refused."""

import datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.commands.cli import app
from cluster.security.keys import KeyFile, KeyFileError, KeyRing, Right, new_key, read_keys, write_keys

GENERATE = frozenset({Right.GENERATE})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def test_a_file_holds_no_secret_and_only_its_owner_reads_it(path: Path) -> None:
    key, text = new_key("alice", GENERATE)
    write_keys(path, KeyFile(keys=(key,)))
    secret = text.partition(".")[2]
    assert len(secret) == 43
    assert secret not in path.read_text()
    assert secret not in repr(key)
    assert key.secret_sha256 not in repr(key)
    assert path.stat().st_mode & 0o077 == 0
    assert read_keys(path).keys == (key,)


def test_a_key_is_found_by_its_id_and_its_whole_secret_only(path: Path) -> None:
    key, text = new_key("alice", GENERATE)
    write_keys(path, KeyFile(keys=(key,)))
    ring = KeyRing(path)
    assert ring.find(text) == key
    for other in (text[:-1], text + "x", text.replace("alice", "bob"), "alice.", "alice", "", ".", text + "x" * 200):
        assert ring.find(other) is None
    assert ring.find("alice.\udcff\x00ä") is None


def test_a_key_is_added_and_revoked_while_the_ring_is_used(path: Path) -> None:
    first, _ = new_key("first", GENERATE)
    write_keys(path, KeyFile(keys=(first,)))
    ring = KeyRing(path)
    second, text = new_key("second", GENERATE)
    assert ring.find(text) is None
    write_keys(path, KeyFile(keys=(first, second)))
    assert ring.find(text) == second
    write_keys(path, KeyFile(keys=(first, second.model_copy(update={"is_revoked": True}))))
    found = ring.find(text)
    assert found
    assert found.is_revoked


@pytest.mark.parametrize("data", [b"", b"{", b'{"keys": 3}', b'{"keys": [{"id": "a"}]}', b"[" * 100_000, None])
def test_a_file_that_cannot_be_used_opens_nothing_and_closes_nothing(
    path: Path, data: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    key, text = new_key("alice", GENERATE)
    write_keys(path, KeyFile(keys=(key,)))
    ring = KeyRing(path)
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    assert ring.find(text) == key
    assert ring.find("bob.secret") is None
    assert caplog.text.count("kept the keys that were read before") == 1
    assert "kept the keys that were read before" in ring.fault()
    with pytest.raises(KeyFileError, match=r"keys\.json"):
        KeyRing(path)


def test_a_file_that_is_no_json_is_named_with_the_reason_and_one_colon(path: Path) -> None:
    path.write_text("ann.secret")
    with pytest.raises(KeyFileError, match=r"keys\.json: Invalid JSON") as raised:
        read_keys(path)
    assert "secret" not in str(raised.value)


def test_two_keys_with_one_id_are_refused(path: Path) -> None:
    write_keys(path, KeyFile(keys=(new_key("alice", GENERATE)[0], new_key("alice", GENERATE)[0])))
    with pytest.raises(KeyFileError, match="same id"):
        read_keys(path)


@pytest.mark.parametrize("key_id", ["", "Alice", "a b", "a.b", "x" * 33, "-a", "a\n"])
def test_an_id_that_is_no_label_is_refused(key_id: str) -> None:
    with pytest.raises(KeyFileError, match="id"):
        new_key(key_id, GENERATE)


def test_a_key_ends_at_its_time() -> None:
    end = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)
    key, _ = new_key("alice", GENERATE, expires=end)
    assert not key.is_expired(end - datetime.timedelta(seconds=1))
    assert key.is_expired(end)


def test_keys_are_made_listed_and_revoked_by_command(path: Path) -> None:
    runner = CliRunner()
    options = ["--right", "generate", "--right", "admin", "--days", "30", "--max-concurrent-requests", "8"]
    added = runner.invoke(app, ["keys", "add", str(path), "alice", *options])
    assert added.exit_code == 0
    text = added.stdout.strip()
    found = KeyRing(path).find(text)
    assert found
    assert found.rights == {Right.GENERATE, Right.ADMIN}
    assert found.max_concurrent_requests == 8
    assert runner.invoke(app, ["keys", "add", str(path), "alice"]).exit_code == 1
    listed = runner.invoke(app, ["keys", "list", str(path)]).stdout
    assert "alice" in listed
    assert "valid" in listed
    assert text.partition(".")[2] not in listed
    assert runner.invoke(app, ["keys", "revoke", str(path), "alice"]).exit_code == 0
    assert "revoked" in runner.invoke(app, ["keys", "list", str(path)]).stdout
    assert runner.invoke(app, ["keys", "revoke", str(path), "bob"]).exit_code == 1


def test_a_file_of_keys_that_is_put_back_is_no_fault_any_more(path: Path) -> None:
    key, text = new_key("alice", GENERATE)
    write_keys(path, KeyFile(keys=(key,)))
    ring = KeyRing(path)
    data = path.read_bytes()
    path.unlink()
    assert "No such file" in ring.fault()
    path.write_bytes(data)
    assert ring.fault() == ""
    assert ring.find(text) == key


def test_a_key_that_is_written_to_a_file_is_for_its_owner_alone_and_never_replaces_one(path: Path) -> None:
    out = path.parent / "alice.key"
    runner = CliRunner()
    added = runner.invoke(app, ["keys", "add", str(path), "alice", "--out", str(out)])
    assert (added.exit_code, added.stdout) == (0, "")
    assert out.stat().st_mode & 0o777 == 0o600
    assert KeyRing(path).find(out.read_text().strip())
    again = runner.invoke(app, ["keys", "add", str(path), "bob", "--out", str(out)])
    assert again.exit_code == 1
    assert "exists already" in again.output
    assert read_keys(path).by_id().keys() == {"alice"}
