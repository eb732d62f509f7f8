"""The policies let through the flows that Mobula has, and no other."""

from collections.abc import Iterator
from typing import Any

import pytest

from cluster.config import MobulaConfig
from tests.k8s.manifests import OVERLAYS, Group, config, groups, of_kind, render

Flow = tuple[str, str, int]  # from, to, port; Pods of Mobula by role, others by name
RAY_PORTS = (8265, 52365)  # dashboard and its agent, besides those that rayStartParams give
PROMETHEUS, KUBERAY, CLIENTS = "prometheus", "kuberay-operator", "clients"
WITH_POLICIES = [name for name in OVERLAYS if of_kind(render(f"overlays/{name}"), "NetworkPolicy")]


def wanted(found: dict[str, Group], settings: MobulaConfig) -> set[Flow]:
    """Every flow there should be, each from the configuration."""
    worker, shard, gateway = settings.attention_workers, settings.expert_shards, settings.gateway
    flows = {
        (CLIENTS, "gateway", gateway.port),
        ("gateway", "gateway", settings.controller.port),  # the controller lives on one of their Pods
        ("gateway", "attention", worker.port),
        ("attention", "expert", shard.port),
        ("expert", "expert", shard.port),
        ("gateway", "attention", worker.metrics_port),
        ("gateway", "expert", shard.metrics_port),
    }
    ray_ports = {6379, *RAY_PORTS}
    for group in found.values():
        start = {key: int(value) for key, value in group.ray_start.items() if key.endswith("-port")}
        ray_ports |= set(start.values()) | set(range(start["min-worker-port"], start["max-worker-port"] + 1))
    flows |= {(source, target, port) for source in found for target in found for port in ray_ports}
    flows |= {(PROMETHEUS, role, port) for role in found for port in (8080, gateway.metrics_port)}
    return flows | {(KUBERAY, role, port) for role in found for port in (*RAY_PORTS, 8000)}


def ports(rule: dict[str, Any]) -> Iterator[int]:
    for port in rule["ports"]:
        yield from range(port["port"], port.get("endPort", port["port"]) + 1)


def peers(rule: dict[str, Any], key: str, found: dict[str, Group]) -> set[str]:
    """Roles, or the name of who is outside."""
    names = set()
    for peer in rule[key]:
        labels = peer.get("podSelector", {}).get("matchLabels", {})
        if "namespaceSelector" not in peer:
            names |= {role for role, group in found.items() if labels.items() <= group.pod_labels.items()}
        elif labels:
            names |= set(labels.values())
        else:
            assert peer["namespaceSelector"]["matchLabels"] == {"mobula/client": "true"}
            names.add(CLIENTS)
    return names


def allowed(policies: list[dict[str, Any]], found: dict[str, Group], direction: str) -> set[Flow]:
    """What the policies' ingress or egress rules let through."""
    flows: set[Flow] = set()
    for policy in policies:
        labels = policy["spec"]["podSelector"]["matchLabels"]
        roles = [role for role, group in found.items() if labels.items() <= group.pod_labels.items()]
        assert roles, policy["metadata"]["name"]
        for rule in policy["spec"].get(direction, []):
            others = peers(rule, "from" if direction == "ingress" else "to", found)
            for role in roles:
                pairs = [(other, role) if direction == "ingress" else (role, other) for other in others]
                flows |= {(source, target, port) for source, target in pairs for port in ports(rule)}
    return flows


@pytest.mark.parametrize("name", WITH_POLICIES)
def test_pods_take_exactly_the_flows_there_should_be(name: str) -> None:
    manifests = render(f"overlays/{name}")
    found, policies = groups(manifests), of_kind(manifests, "NetworkPolicy")
    assert allowed(policies, found, "ingress") == wanted(found, config(manifests))


@pytest.mark.parametrize("name", WITH_POLICIES)
def test_pods_may_call_exactly_whom_they_should(name: str) -> None:
    manifests = render(f"overlays/{name}")
    found, policies = groups(manifests), of_kind(manifests, "NetworkPolicy")
    outward = {flow for flow in allowed(policies, found, "egress") if flow[1] != "kube-dns"}
    assert outward == {flow for flow in wanted(found, config(manifests)) if flow[0] in found}
    assert {flow for flow in allowed(policies, found, "egress") if flow[1] == "kube-dns"} == {
        (role, "kube-dns", 53) for role in found
    }


@pytest.mark.parametrize("name", WITH_POLICIES)
def test_what_no_rule_names_is_denied(name: str) -> None:
    manifests = render(f"overlays/{name}")
    (deny,) = [p for p in of_kind(manifests, "NetworkPolicy") if p["metadata"]["name"] == "mobula-deny"]
    assert deny["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert not {"ingress", "egress"} & set(deny["spec"])
    selected = deny["spec"]["podSelector"]["matchLabels"]
    assert all(selected.items() <= group.pod_labels.items() for group in groups(manifests).values())
