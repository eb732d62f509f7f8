"""Certificates and keys: each Pod has those of its own role, where the configuration looks for them."""

from pathlib import PurePosixPath

import pytest

from cluster.security.http_tls import READER_NAME
from protos.credentials import PeerRole
from protos.mutual_tls import role_name
from tests.k8s.manifests import OVERLAYS, Manifest, config, groups, of_kind, render

ROLES = {
    "gateway": {PeerRole.GATEWAY, PeerRole.CONTROLLER},
    "attention": {PeerRole.WORKER},
    "expert": {PeerRole.SHARD},
    "head": set(),
}
WITH_TLS = "overlays/v2-multinode"


def secrets(manifests: list[Manifest], role: str) -> dict[str, str]:
    """Names of the Secrets that a role's Pods mount, by path."""
    group = groups(manifests)[role]
    volumes = {v["name"]: v["secret"]["secretName"] for v in group.template["spec"]["volumes"] if "secret" in v}
    mounts = group.container["volumeMounts"]
    return {mount["mountPath"]: volumes[mount["name"]] for mount in mounts if mount["name"] in volumes}


@pytest.mark.parametrize("name", OVERLAYS)
def test_what_the_configuration_asks_for_is_mounted_and_nothing_more(name: str) -> None:
    manifests = render(f"overlays/{name}")
    settings = config(manifests)
    for role, owned in ROLES.items():
        wanted = {f"{settings.tls.processes}/{peer}": f"mobula-{peer}-tls" for peer in owned if settings.tls.processes}
        if role == "gateway" and settings.tls.clients:
            wanted[settings.tls.clients] = "mobula-public-tls"
        if role == "gateway" and settings.gateway.keys:
            wanted[str(PurePosixPath(settings.gateway.keys).parent)] = "mobula-keys"
        assert secrets(manifests, role) == wanted


def test_each_role_has_a_certificate_that_carries_its_name() -> None:
    certificates = {c["spec"]["secretName"]: c["spec"] for c in of_kind(render(WITH_TLS), "Certificate")}
    for peer in PeerRole:
        certificate = certificates[f"mobula-{peer}-tls"]
        assert certificate["dnsNames"] == [role_name(peer)]
        assert set(certificate["usages"]) == {"server auth", "client auth"}
        assert certificate["issuerRef"] == {"name": "mobula-authority", "kind": "Issuer"}
    assert certificates["mobula-public-tls"]["usages"] == ["server auth"]  # no process would take it for a peer's


@pytest.mark.parametrize("name", OVERLAYS)
def test_prometheus_asks_metrics_pages_as_they_want_it(name: str) -> None:
    manifests = render(f"overlays/{name}")
    for monitor in of_kind(manifests, "PodMonitor"):
        endpoints = monitor["spec"]["podMetricsEndpoints"]
        settings = config(manifests)
        assert {e.get("scheme", "http") for e in endpoints} == {"https" if settings.tls.metrics else "http"}
        assert any("authorization" in e for e in endpoints) == settings.gateway.http_key
        if settings.tls.metrics:
            names = [e["tlsConfig"]["serverName"] for e in endpoints]
            assert names == [
                *map(role_name, (PeerRole.WORKER, PeerRole.SHARD)),
                "mobula",
                role_name(PeerRole.CONTROLLER),
            ]
            certificates = {c["spec"]["secretName"]: c["spec"] for c in of_kind(manifests, "Certificate")}
            for endpoint in endpoints:
                for secret in (endpoint["tlsConfig"]["ca"]["secret"], endpoint["tlsConfig"].get("keySecret")):
                    assert secret is None or secret["name"] in certificates
            assert "mobula" in certificates["mobula-public-tls"]["dnsNames"]
            own = certificates["mobula-prometheus-tls"]
            assert own["dnsNames"] == [READER_NAME]  # of no role: opens no gRPC port


def test_authority_is_signed_by_itself_and_signs_the_others() -> None:
    manifests = render(WITH_TLS)
    issuers = {issuer["metadata"]["name"]: issuer["spec"] for issuer in of_kind(manifests, "Issuer")}
    (authority,) = [c["spec"] for c in of_kind(manifests, "Certificate") if c["spec"].get("isCA")]
    assert "selfSigned" in issuers[authority["issuerRef"]["name"]]
    assert issuers["mobula-authority"]["ca"]["secretName"] == authority["secretName"]
