"""Ports that are written down: of two servers on one machine each has its own. Knows the configuration's keys alone."""

from collections.abc import Mapping
from typing import Any

KEYS = ("port", "metrics_port", "health_port")
NUMBERED = ("metrics_port", "health_port")  # of which further gateways of a machine take the next ones
SHARES_LOOPBACK = ("127.0.0.1", "localhost", "0.0.0.0", "::")  # hosts of a gateway whose ports others cannot have
GATEWAY = "gateway"


def fixed_ports(name: str, settings: Any) -> dict[str, int]:
    """Of a part of the configuration, by key."""
    return {f"{name}.{key}": port for key in KEYS if (port := getattr(settings, key, None))}


def check_different_ports(parts: Mapping[str, Any], *, is_one_machine: bool) -> None:
    """parts: of the configuration, the gateway among them; is_one_machine: else others know who shares a node.

    Raises ValueError naming two that are equal.
    """
    ports = {name: fixed_ports(name, settings) for name, settings in parts.items()}
    for own in ports.values():
        _check_different(own)
    if not is_one_machine:
        return
    front = ports.pop(GATEWAY) | _of_further_gateways(parts[GATEWAY])
    on_loopback = {key: port for own in ports.values() for key, port in own.items()}
    _check_different(front)
    _check_different(on_loopback)
    if parts[GATEWAY].host in SHARES_LOOPBACK:
        _check_different(front | on_loopback)


def _of_further_gateways(gateway: Any) -> dict[str, int]:
    return {
        f"{GATEWAY}.{key} of gateway-{rank}": port + rank
        for rank in range(1, gateway.count)
        for key in NUMBERED
        if (port := getattr(gateway, key))
    }


def _check_different(ports: Mapping[str, int]) -> None:
    keys: dict[int, str] = {}
    for key, port in ports.items():
        if (other := keys.setdefault(port, key)) != key:
            raise ValueError(f"{other} and {key} are both {port}; set another port for one of them")
