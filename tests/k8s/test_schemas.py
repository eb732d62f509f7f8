"""Every object of every overlay and component against its schema, strictly; and that the check bites."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from tests.k8s.crd_schemas import faults
from tests.k8s.manifests import COMPONENTS, TARGETS, crd_folder, groups, pods, render, render_component

VERSIONS = ("1.32", "1.37")  # of Kubernetes, from the oldest that is supported to the newest

# No folder here has their definitions; see test_certificates.py and test_keda.py.
NOT_AT_HAND = ("cert-manager.io/v1", "keda.sh/v1alpha1")


def is_custom(manifest: dict[str, Any]) -> bool:
    group = manifest["apiVersion"].partition("/")[0]
    return ("." in group and not group.endswith(".k8s.io")) or group == "gateway.networking.k8s.io"


def custom(manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those whose definitions are at hand."""
    return [m for m in manifests if is_custom(m) and m["apiVersion"] not in NOT_AT_HAND]


def check_built_in(manifests: list[dict[str, Any]], version: str) -> None:
    """Raises kubernetes_validate's errors, for a kind without a schema too."""
    for manifest in manifests:
        kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("target", TARGETS)
def test_built_in_kinds_and_every_pod_template_are_valid(target: str, version: str) -> None:
    manifests = render(target)
    check_built_in([manifest for manifest in manifests if not is_custom(manifest)], version)
    check_built_in(list(pods(manifests)), version)


@pytest.mark.parametrize("target", TARGETS)
def test_custom_resources_are_what_their_definitions_say(target: str) -> None:
    folder = crd_folder()
    found = {f"{m['kind']} {m['metadata']['name']}": faults(m, folder) for m in custom(render(target))}
    assert found
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize("name", COMPONENTS)
def test_every_component_fits_the_base(name: str, tmp_path: Path) -> None:
    manifests = render_component(name, tmp_path)
    check_built_in([manifest for manifest in manifests if not is_custom(manifest)], VERSIONS[0])
    check_built_in(list(pods(manifests)), VERSIONS[0])
    folder = crd_folder()
    assert [fault for m in custom(manifests) for fault in faults(m, folder)] == []


def test_an_unknown_field_of_a_built_in_kind_is_a_fault() -> None:
    budget = next(m for m in render("base") if m["kind"] == "PodDisruptionBudget")
    budget["spec"]["minAvailble"] = budget["spec"].pop("minAvailable")
    with pytest.raises(kubernetes_validate.ValidationError, match="minAvailble"):
        check_built_in([budget], VERSIONS[0])


def test_a_misspelt_probe_of_a_pod_template_is_a_fault() -> None:
    manifests = render("base")
    probe = groups(manifests)["expert"].container["readinessProbe"]["grpc"]
    probe["prt"] = probe.pop("port")
    with pytest.raises(kubernetes_validate.ValidationError, match="prt"):
        check_built_in(list(pods(manifests)), VERSIONS[0])


def test_a_kind_without_a_schema_is_not_passed_over() -> None:
    with pytest.raises(kubernetes_validate.SchemaNotFoundError):
        check_built_in([{"apiVersion": "ray.io/v1", "kind": "RayService"}], VERSIONS[0])
    with pytest.raises(LookupError, match="no definition"):
        faults({"apiVersion": "ray.io/v1", "kind": "RayServise", "metadata": {}}, crd_folder())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda spec: spec["workerGroupSpecs"][0].update(replica=2), "'replica' was unexpected"),
        (lambda spec: spec["workerGroupSpecs"][0].update(replicas="2"), "'2' is not of type 'integer'"),
        (lambda spec: spec["workerGroupSpecs"][0].pop("groupName"), "'groupName' is a required property"),
        (lambda spec: spec["authOptions"].update(mode="none"), "'none' is not one of"),
        (
            lambda spec: spec["workerGroupSpecs"][1]["template"]["spec"]["containers"][0]["readinessProbe"]["grpc"].pop(
                "port"
            ),
            "'port' is a required property",
        ),
    ],
)
def test_a_fault_of_a_custom_resource_is_found_and_named(change: Any, message: str) -> None:
    service = deepcopy(next(m for m in render("base") if m["kind"] == "RayService"))
    change(service["spec"]["rayClusterConfig"])
    (fault,) = faults(service, crd_folder())
    assert message in fault
