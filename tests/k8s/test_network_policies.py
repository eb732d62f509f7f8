"""The policies let through the flows that Mobula has, and no other."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.k8s.manifests import (
    OVERLAYS,
    ROOT,
    Group,
    Manifest,
    config,
    groups,
    of_kind,
    ray_cluster_spec,
    render,
    render_component,
)

Flow = tuple[str, str, int]  # from, to, port; Pods of Mobula by role, others by name
RAY_PORTS = (8265, 52365)  # dashboard and its agent, besides those that rayStartParams give
PROMETHEUS, KUBERAY, CLIENTS = "prometheus", "kuberay-operator", "clients"
DNS, REDIS, REDIS_CLEANUP, HUB = "kube-dns", "mobula-redis", "redis-cleanup", "addresses outside the cluster"
ANY = "any address"  # the API server's is not known


def wanted(manifests: list[Manifest]) -> set[Flow]:
    """Every flow there should be, each from the configuration or from the component that brings its other end."""
    found, settings = groups(manifests), config(manifests)
    worker, shard, gateway = settings.attention_workers, settings.expert_shards, settings.gateway
    flows = {
        (CLIENTS, "gateway", gateway.port),
        ("gateway", "gateway", settings.controller.port),  # the controller lives on one of their Pods
        ("gateway", "gateway", settings.controller.metrics_port),
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
    flows |= {
        (PROMETHEUS, role, port)
        for role in found
        for port in (8080, gateway.metrics_port, settings.controller.metrics_port)
    }
    flows |= {(KUBERAY, role, port) for role in found for port in (*RAY_PORTS, 8000)}
    flows |= {(role, DNS, 53) for role in found}
    if "gcsFaultToleranceOptions" in ray_cluster_spec(manifests):
        flows |= {("head", REDIS, 6379), (REDIS_CLEANUP, REDIS, 6379)}
    if ray_cluster_spec(manifests).get("enableInTreeAutoscaling"):
        flows |= {("head", ANY, 443), ("head", ANY, 6443)}
    if not settings.model.startswith(("/", "bundled")):
        starts = "head" if of_kind(manifests, "RayCluster") else "gateway"  # that reads the checkpoint to check it
        flows |= {(role, HUB, 443) for role in {"gateway", "attention", "expert", starts}}
    return flows


def selected(selector: Manifest, found: dict[str, Group]) -> set[str]:
    """Roles, or the name of another Pod of ours."""
    labels = selector["matchLabels"]
    roles = {role for role, group in found.items() if labels.items() <= group.pod_labels.items()}
    for expression in selector.get("matchExpressions", []):
        assert (expression["key"], expression["operator"]) == ("app.kubernetes.io/component", "In")
        roles &= set(expression["values"])
    return roles or set(labels.values())


def ports(rule: Manifest) -> Iterator[int]:
    for port in rule["ports"]:
        yield from range(port["port"], port.get("endPort", port["port"]) + 1)


def peers(rule: Manifest, key: str, found: dict[str, Group]) -> set[str]:
    """Roles, or the name of who is outside."""
    names = set()
    for peer in rule[key]:
        labels = peer.get("podSelector", {}).get("matchLabels", {})
        if "ipBlock" in peer:
            assert peer["ipBlock"]["cidr"] == "0.0.0.0/0"
            spared = set(peer["ipBlock"].get("except", ()))
            assert not spared or {"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"} < spared
            names.add(HUB if spared else ANY)
        elif "namespaceSelector" not in peer:
            names |= selected(peer["podSelector"], found)
        elif labels:
            names |= set(labels.values())
        else:
            assert peer["namespaceSelector"]["matchLabels"] == {"mobula/client": "true"}
            names.add(CLIENTS)
    return names


def allowed(policies: list[Manifest], found: dict[str, Group], direction: str) -> set[Flow]:
    """What the policies' ingress or egress rules let through."""
    flows: set[Flow] = set()
    for policy in policies:
        roles = selected(policy["spec"]["podSelector"], found)
        for rule in policy["spec"].get(direction, []):
            others = peers(rule, "from" if direction == "ingress" else "to", found)
            for role in roles:
                pairs = [(other, role) if direction == "ingress" else (role, other) for other in others]
                flows |= {(source, target, port) for source, target in pairs for port in ports(rule)}
    return flows


@pytest.mark.parametrize("name", OVERLAYS)
def test_pods_take_exactly_the_flows_there_should_be(name: str) -> None:
    manifests = render(f"overlays/{name}")
    ours = {*groups(manifests), REDIS}
    policies = of_kind(manifests, "NetworkPolicy")
    assert allowed(policies, groups(manifests), "ingress") == {flow for flow in wanted(manifests) if flow[1] in ours}


@pytest.mark.parametrize("name", OVERLAYS)
def test_pods_may_call_exactly_whom_they_should(name: str) -> None:
    manifests = render(f"overlays/{name}")
    found, policies = groups(manifests), of_kind(manifests, "NetworkPolicy")
    assert allowed(policies, found, "egress") == {flow for flow in wanted(manifests) if flow[0] in found}


def test_mobula_serve_beside_the_head_reaches_the_hub_that_has_its_checkpoint(tmp_path: Path) -> None:
    manifests = render_component("raycluster", tmp_path, "overlays/v2-lite-1node")
    found, policies = groups(manifests), of_kind(manifests, "NetworkPolicy")
    assert allowed(policies, found, "egress") == {flow for flow in wanted(manifests) if flow[0] in found}


@pytest.mark.parametrize("name", OVERLAYS)
def test_what_no_rule_names_is_denied(name: str) -> None:
    manifests = render(f"overlays/{name}")
    (deny,) = [p for p in of_kind(manifests, "NetworkPolicy") if p["metadata"]["name"] == "mobula-deny"]
    assert deny["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert not {"ingress", "egress"} & set(deny["spec"])
    assert selected(deny["spec"]["podSelector"], groups(manifests)) == set(groups(manifests))


def test_a_rule_too_many_is_noticed() -> None:
    manifests = render("overlays/cpu-demo")
    policies = of_kind(manifests, "NetworkPolicy")
    expert = next(policy for policy in policies if policy["metadata"]["name"] == "mobula-expert")
    expert["spec"]["ingress"][0]["ports"].append({"port": 22})
    extra = allowed(policies, groups(manifests), "ingress") - wanted(manifests)
    assert extra == {("attention", "expert", 22)}


WHO = {"gateways": "gateway", "the gateway": "gateway", "workers": "attention", "other shards": "expert"} | {
    "Prometheus": PROMETHEUS,
    "clients": CLIENTS,
}
BY_PORT_FORWARD = "operators"  # they come through the API server, which no policy sees


def test_flows_are_those_of_the_threat_model() -> None:
    manifests = render("overlays/cpu-demo")
    settings = config(manifests)
    text = (ROOT / "docs" / "threat-model.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("|")]
    compared = 0
    for section in ("gateway", "attention_workers", "expert_shards", "controller"):
        for port, who in rows:
            if f"`{section}.port`" in port:
                sources = {WHO[name.strip()] for name in who.split(",") if name.strip() != BY_PORT_FORWARD}
                number = getattr(settings, section).port
                assert {source for source, _, to in wanted(manifests) if to == number} == sources, port
                compared += 1
    assert compared == 4
