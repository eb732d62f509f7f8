"""Custom resources against a real API server: what it would refuse, CEL rules and all. `make test-crds`."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.k8s.api_server import ApiServer
from tests.k8s.manifests import COMPONENTS, TARGETS, Manifest, crd_folder, render, render_component
from tests.k8s.test_schemas import NOT_AT_HAND, is_custom

pytestmark = [pytest.mark.api_server, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    programs = os.environ.get("MOBULA_API_SERVER")
    assert programs, "set MOBULA_API_SERVER to the folder that tests.k8s.build_api_server filled"
    with ApiServer(Path(programs), tmp_path_factory.mktemp("api-server")) as server:
        server.define(crd_folder())
        yield server


def refusals(server: ApiServer, manifests: list[Manifest]) -> dict[str, str]:
    """Of everything custom; what nobody's definition is at hand for is left out by name."""
    objects = [m for m in manifests if is_custom(m) and (server.knows(m) or m["apiVersion"] not in NOT_AT_HAND)]
    assert objects
    assert all(server.knows(manifest) for manifest in objects)
    found = {f"{m['kind']} {m['metadata']['name']}": server.refusal(m) for m in objects}
    return {name: refusal for name, refusal in found.items() if refusal}


@pytest.mark.parametrize("target", TARGETS)
def test_it_takes_every_custom_resource(server: ApiServer, target: str) -> None:
    assert refusals(server, render(target)) == {}


@pytest.mark.parametrize("name", COMPONENTS)
def test_it_takes_every_components(server: ApiServer, name: str, tmp_path: Path) -> None:
    assert refusals(server, render_component(name, tmp_path)) == {}


def misspell_probe(cluster: dict[str, Any]) -> None:
    probe = cluster["workerGroupSpecs"][1]["template"]["spec"]["containers"][0]["readinessProbe"]
    probe["grpc"] = {"prt": 50055}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda cluster: cluster["workerGroupSpecs"][0].update(replica=2), "unknown field"),
        (lambda cluster: cluster["workerGroupSpecs"][0].update(replicas="2"), "replicas"),
        (misspell_probe, "unknown field"),
    ],
    ids=["unknown field", "wrong type", "probe without a port"],
)
def test_it_refuses_what_is_wrong(server: ApiServer, change: Callable[[dict[str, Any]], None], words: str) -> None:
    (service,) = [m for m in render("base") if m["kind"] == "RayService"]
    change(service["spec"]["rayClusterConfig"])
    assert words in server.refusal(service)


def test_it_refuses_what_only_a_rule_forbids(server: ApiServer, tmp_path: Path) -> None:
    manifests = render_component("gateway-api", tmp_path)
    (route,) = [m for m in manifests if m["kind"] == "GRPCRoute"]
    route["spec"]["rules"][0]["matches"][0]["method"] = {}
    assert "must be specified" in server.refusal(route)
