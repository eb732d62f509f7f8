"""Which ports gateways listen on that share a machine."""

from concurrent.futures import ThreadPoolExecutor
from wsgiref.types import WSGIApplication

import pytest
from prometheus_client import make_wsgi_app

from cluster.chaos.deployment import free_port
from cluster.config import parse_config
from cluster.roles.gateway_role import GatewayRole
from router.expert_map import ExpertMap
from tests.fake_experts import grouped_gate, placed

HOST = "127.0.0.1"


class FakeGateway(GatewayRole):
    """Has ports, and nothing behind them."""

    def _load(self, expert_map: ExpertMap) -> tuple[str, int]:
        return "", 0

    def _http_app(self) -> WSGIApplication:
        return make_wsgi_app(self._registry)


@pytest.mark.parametrize("address", [None, "auto"])
def test_gateways_that_start_at_the_same_moment_on_a_machine_have_a_port_each(address: str | None) -> None:
    first = free_port(HOST, 3)
    config = parse_config({"gateway": {"count": 3, "host": HOST, "metrics_port": first}, "ray": {"address": address}})
    gateways = [FakeGateway(config, None, rank) for rank in range(3)]
    expert_map = placed(grouped_gate(), 1)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda gateway: gateway.load(expert_map), gateways))
    ports = [int(gateway.health().metrics_address.rpartition(":")[2]) for gateway in gateways]
    assert sorted(ports) == [first, first + 1, first + 2]
    if address is None:
        assert ports[0] == first
    for gateway in gateways:
        gateway.stop(0.0)
