"""Where a Prometheus finds every process on a Ray cluster without Kubernetes: HTTP service discovery (http_sd_configs).

The gateway's own target is its own series alone: everybody's are on its page for those who scrape nothing else.
"""

from collections.abc import Mapping
from typing import Any

OWN_PATH = "/metrics/own"


def scrape_targets(gateway_address: str, processes: Mapping[str, str]) -> list[dict[str, Any]]:
    """Target groups. gateway_address: host:port at which it was asked; processes: name ("worker-0") -> host:port."""
    gateway = {"targets": [gateway_address], "labels": {"process": "gateway-0", "__metrics_path__": OWN_PATH}}
    others = [
        {"targets": [address], "labels": {"process": name, "__metrics_path__": "/metrics"}}
        for name, address in sorted(processes.items())
    ]
    return [gateway, *others]
