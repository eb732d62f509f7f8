"""What is taken for a client's key, and what is told where there is none. The rest: tests/integration."""

from pathlib import Path

import pytest

from cluster.client_access import API_KEY, API_KEY_FILE, AccessError, ClientAccess
from cluster.security.keys import KeyFile, Right, new_key, write_keys

KEY, TEXT = new_key("ann", frozenset([Right.GENERATE]))
NO_KEYS = {
    "empty": b"",
    "blank": b" \n",
    "two keys": f"{TEXT}\n{TEXT}\n".encode(),
    "no dot": b"secret\n",
    "words": b"ann.my secret\n",
    "not ASCII": "ann.gehe\u00efm\n".encode(),
    "random bytes": bytes(range(256)),
}


@pytest.mark.parametrize("content", NO_KEYS.values(), ids=NO_KEYS.keys())
def test_a_file_that_holds_no_key_is_named_and_what_it_holds_is_not(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ann.key"
    path.write_bytes(content)
    with pytest.raises(AccessError) as raised:
        ClientAccess.from_environment({API_KEY_FILE: str(path)})
    assert str(raised.value) == f"{path} holds no key, which is one line ID.SECRET"


def test_the_gateways_file_of_keys_is_no_key(tmp_path: Path) -> None:
    write_keys(tmp_path / "keys.json", KeyFile(keys=(KEY,)))
    with pytest.raises(AccessError, match=r"keys\.json holds no key, which is one line ID\.SECRET$"):
        ClientAccess.from_environment({API_KEY_FILE: str(tmp_path / "keys.json")})


@pytest.mark.parametrize("text", ["foo\nbar", "ann.a\nb", "ann.\udcff", "ann."])
def test_a_variable_that_holds_no_key_is_named(text: str) -> None:
    with pytest.raises(AccessError, match=r"^MOBULA_API_KEY holds no key, which is one line ID\.SECRET$"):
        ClientAccess.from_environment({API_KEY: text})


def test_a_key_may_end_its_line(tmp_path: Path) -> None:
    (tmp_path / "ann.key").write_text(f"{TEXT}\n")
    assert ClientAccess.from_environment({API_KEY_FILE: str(tmp_path / "ann.key")}).api_key == TEXT
    assert ClientAccess.from_environment({API_KEY: f"{TEXT}\n"}).api_key == TEXT
    assert ClientAccess.from_environment({API_KEY: ""}).api_key is None
