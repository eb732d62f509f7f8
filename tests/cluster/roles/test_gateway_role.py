"""A gateway's process about itself."""

from pathlib import Path

from cluster.config import parse_config
from cluster.controller.process import ProcessState
from cluster.roles.gateway_role import GatewayRole
from cluster.security.keys import KeyFile, Right, new_key, write_keys
from tests.fake_experts import grouped_gate, placed


def test_a_file_of_keys_that_vanishes_shows_in_its_health_until_it_is_back(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    write_keys(path, KeyFile(keys=(new_key("alice", frozenset([Right.GENERATE]))[0],)))
    settings = {"port": 0, "metrics_port": 0, "keys": str(path), "dashboard": False}
    role = GatewayRole(parse_config({"gateway": settings}), "127.0.0.1")
    try:
        role.load(placed(grouped_gate(), 2))
        assert (role.health().state, role.health().detail) == (ProcessState.READY, "")
        data = path.read_bytes()
        path.unlink()
        assert "kept the keys that were read before: cannot read the keys in" in role.health().detail
        path.write_bytes(data)
        assert role.health().detail == ""
    finally:
        role.stop(0.0)
