"""What is checked before a start, and what operators are told that they leave open."""

from pathlib import Path

import pytest

from cluster.config import ConfigError, parse_config
from cluster.security.exposure import check_files, exposures
from tests.certificates import make_authority


def test_the_defaults_expose_nothing() -> None:
    assert exposures(parse_config(None)) == []


def test_an_open_port_without_keys_and_tls_is_told() -> None:
    told = exposures(parse_config({"gateway": {"host": "0.0.0.0"}, "ray": {"address": "auto"}}))
    assert [sentence.rpartition("set ")[2].split(",")[0] for sentence in told] == [
        "gateway.keys",
        "tls.clients",
        "tls.processes",
    ]


def test_an_open_dashboard_beside_keys_is_told() -> None:
    told = exposures(parse_config({"gateway": {"host": "0.0.0.0", "keys": "keys.json"}, "tls": {"clients": "x"}}))
    assert told == ["whoever reaches the gateway's HTTP port may see the dashboard; set gateway.http_key"]


def test_a_protected_system_is_not_told_anything(tmp_path: Path) -> None:
    tls = {"processes": str(tmp_path), "clients": str(tmp_path / "public")}
    gateway = {"host": "0.0.0.0", "keys": "keys.json", "http_key": True}
    data = {"gateway": gateway, "ray": {"address": "auto"}, "tls": tls}
    assert exposures(parse_config(data)) == []


@pytest.mark.parametrize("key", ["tls.processes", "tls.clients", "gateway.keys"])
def test_a_missing_file_is_found_before_the_start_with_its_key(tmp_path: Path, key: str) -> None:
    make_authority(tmp_path / "tls")
    section, name = key.split(".")
    with pytest.raises(ConfigError, match=f"{key}: .*{tmp_path / 'none'}.*mobula"):
        check_files(parse_config({section: {name: str(tmp_path / "none")}}))
    check_files(parse_config({"tls": {"processes": str(tmp_path / "tls"), "clients": str(tmp_path / "tls/public")}}))


def test_a_key_for_http_needs_keys() -> None:
    with pytest.raises(ConfigError, match="http_key needs `keys`"):
        parse_config({"gateway": {"http_key": True}})


def test_client_certificates_need_an_authority() -> None:
    with pytest.raises(ConfigError, match="require_client_certificate needs `clients`"):
        parse_config({"tls": {"require_client_certificate": True}})
