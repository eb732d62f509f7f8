"""Where a Prometheus finds every process on a Ray cluster without Kubernetes: HTTP service discovery (http_sd_configs).

The gateway's own target is its own series alone: everybody's are on its page for those who scrape nothing else.
"""

from collections.abc import Mapping
from typing import Any

OWN_PATH = "/metrics/own"
COMPONENTS = {"worker": "attention", "shard": "expert"}  # as Pods are labelled on Kubernetes, so that rules fit both


def scrape_targets(gateway_address: str, processes: Mapping[str, str], scheme: str) -> list[dict[str, Any]]:
    """Target groups. gateway_address: host:port at which it was asked; processes: name ("worker-0") -> host:port."""
    groups = [_group("gateway", gateway_address, OWN_PATH, scheme)]
    for name, address in sorted(processes.items()):
        role = name.partition("-")[0]
        groups.append(_group(COMPONENTS.get(role, role), address, "/metrics", scheme))
    return groups


def _group(component: str, address: str, path: str, scheme: str) -> dict[str, Any]:
    labels = {"component": component, "__metrics_path__": path, "__scheme__": scheme}
    return {"targets": [address], "labels": labels}
