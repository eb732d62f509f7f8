"""What the manifests say and what Mobula's configuration in them says agree, and each Pod keeps the rules."""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from ray.serve.schema import ServeDeploySchema

from cluster import serve_app
from cluster.commands.cli import app
from cluster.config import ActorConfig, MobulaConfig, PlacementStrategy
from cluster.controller.lease import LEASE_S
from tests.k8s.manifests import (
    K8S,
    OVERLAYS,
    TARGETS,
    Group,
    Manifest,
    config,
    groups,
    of_kind,
    pods,
    ray_cluster_spec,
    render,
    render_component,
)

PLAIN = "overlays/raycluster"  # without Serve
STOP_MARGIN_S = 30.0  # beyond the drains of gateways, workers and shards, for a process to end
STARTED_PORT_KEYS = ("node-manager-port", "object-manager-port", "dashboard-agent-grpc-port", "runtime-env-agent-port")


def actor_settings(settings: MobulaConfig) -> dict[str, ActorConfig]:
    return {"attention": settings.attention_workers, "expert": settings.expert_shards}


def grpc_ports(settings: MobulaConfig) -> dict[str, int]:
    return {role: actors.port for role, actors in actor_settings(settings).items()} | {"gateway": settings.gateway.port}


def check_ports(manifests: list[Manifest]) -> None:
    found, settings = groups(manifests), config(manifests)
    roles = actor_settings(settings) | {"gateway": settings.gateway}
    for role, port in grpc_ports(settings).items():
        assert found[role].container["readinessProbe"]["grpc"]["port"] == roles[role].health_port
        serving = [number for name, number in found[role].ports.items() if name.startswith("serve-")]
        assert port in serving
        assert (found[role].ports["ep-metrics"], found[role].ports["health"]) == (
            roles[role].metrics_port,
            roles[role].health_port,
        )
    assert found["gateway"].ports["admin-grpc"] == settings.controller.port
    assert found["gateway"].ports["ctl-metrics"] == settings.controller.metrics_port
    assert settings.gateway.host == "0.0.0.0"


@pytest.mark.parametrize("target", TARGETS)
def test_ports_and_probes_are_those_that_the_configuration_opens(target: str) -> None:
    check_ports(render(target))


@pytest.mark.parametrize("target", TARGETS)
def test_each_role_finds_its_nodes_by_label_and_has_one_for_each_process(target: str) -> None:
    manifests = render(target)
    found, settings = groups(manifests), config(manifests)
    assert set(found) == {"head", "gateway", "attention", "expert"}
    for role, actors in actor_settings(settings).items():
        group = found[role]
        assert actors.labels.items() <= group.ray_labels.items()
        assert (actors.count, actors.strategy) == (group.replicas, PlacementStrategy.STRICT_SPREAD)
        limits = group.container["resources"]["limits"]
        assert (actors.num_cpus, actors.num_gpus) == (float(limits["cpu"]), float(limits.get("nvidia.com/gpu", 0)))
        assert actors.num_threads == int(limits["cpu"])
    for labels in (settings.gateway.labels, settings.controller.labels):
        assert labels
        assert labels.items() <= found["gateway"].ray_labels.items()
    assert settings.ray.address == "auto"


@pytest.mark.parametrize("target", TARGETS)
def test_rays_autoscaler_may_get_what_mobula_may_ask_for(target: str) -> None:
    manifests = render(target)
    spec, settings = ray_cluster_spec(manifests), config(manifests)
    scalings = {"expert": settings.expert_shards.autoscaling, "attention": settings.attention_workers.autoscaling}
    assert spec.get("enableInTreeAutoscaling", False) == any(scaling.enabled for scaling in scalings.values())
    for group in spec["workerGroupSpecs"]:
        fewest, most = group["minReplicas"], group["maxReplicas"]
        scaling = scalings.get(group["groupName"])
        if scaling and scaling.enabled:
            assert (fewest, most) == (scaling.min_count, scaling.max_count)
            assert fewest <= group["replicas"] <= most
        else:
            assert fewest == most == group["replicas"]


@pytest.mark.parametrize("target", TARGETS)
def test_ray_listens_on_fixed_ports_that_name_no_other(target: str) -> None:
    for group in groups(render(target)).values():
        started = {int(group.ray_start[key]) for key in STARTED_PORT_KEYS}
        workers = range(int(group.ray_start["min-worker-port"]), int(group.ray_start["max-worker-port"]) + 1)
        assert len(started) == len(STARTED_PORT_KEYS)
        assert not started & set(group.ports.values())
        assert not set(workers) & (started | set(group.ports.values()))


@pytest.mark.parametrize("target", [target for target in TARGETS if target != PLAIN])
def test_serve_is_asked_for_the_application_and_waits_for_the_drain(target: str) -> None:
    manifests = render(target)
    (service,) = of_kind(manifests, "RayService")
    schema = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = schema.applications
    assert application.import_path == f"{serve_app.__name__}:{serve_app.app.__name__}"
    path = serve_app.AppArgs.model_validate(application.args).config
    (deployment,) = application.deployments
    assert deployment.name == serve_app.System.name
    settings, gateway = config(manifests), groups(manifests)["gateway"]
    assert deployment.ray_actor_options.label_selector.items() <= gateway.ray_labels.items()
    (mount,) = [mount for mount in gateway.container["volumeMounts"] if path.startswith(mount["mountPath"] + "/")]
    volumes = {volume["name"]: volume for volume in gateway.template["spec"]["volumes"]}
    assert volumes[mount["name"]]["configMap"]["name"] == "mobula-config"
    assert deployment.health_check_period_s <= serve_app.HEALTH_PERIOD_S < LEASE_S / 2
    assert deployment.graceful_shutdown_timeout_s >= 3 * settings.drain_timeout_s + STOP_MARGIN_S


def test_plain_cluster_is_that_of_the_service_with_mobula_serve_beside_the_head() -> None:
    plain, service = render(PLAIN), render("overlays/cpu-demo")
    assert (of_kind(plain, "RayService"), of_kind(service, "RayCluster")) == ([], [])
    spec, original = ray_cluster_spec(plain), ray_cluster_spec(service)
    assert spec["workerGroupSpecs"] == original["workerGroupSpecs"]
    assert spec["headGroupSpec"]["template"]["spec"]["shareProcessNamespace"] is True


@pytest.mark.parametrize("name", [name for name in OVERLAYS if name != "raycluster"])
def test_mobula_serve_beside_the_head_reads_and_runs_what_the_application_does_on_a_gateway(
    name: str, tmp_path: Path
) -> None:
    manifests = render_component("raycluster", tmp_path, f"overlays/{name}")
    head, gateway = groups(manifests)["head"].template["spec"], groups(manifests)["gateway"]
    ray_head, serve = head["containers"]
    assert serve["command"][:2] == ["mobula", "serve"]
    assert [serve.get(key) for key in ("image", "volumeMounts", "envFrom")] == [
        gateway.container.get(key) for key in ("image", "volumeMounts", "envFrom")
    ]
    assert all(variable in serve["env"] for variable in gateway.container["env"])
    assert {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} < {variable["name"] for variable in serve["env"]}
    assert {"ports", "lifecycle", "readinessProbe"} & set(serve) == set()
    assert all(volume in head["volumes"] for volume in gateway.template["spec"]["volumes"])
    ours = {mount["mountPath"]: mount["name"] for mount in serve["volumeMounts"]}
    assert {mount["mountPath"]: mount["name"] for mount in ray_head["volumeMounts"]}.items() <= ours.items()
    assert ours[str(Path(serve["command"][-1]).parent)] == "config"


@pytest.mark.parametrize("name", [name for name in OVERLAYS if name != "raycluster"])
def test_ray_stays_until_mobula_serve_beside_it_has_drained(name: str, tmp_path: Path) -> None:
    manifests = render_component("raycluster", tmp_path, f"overlays/{name}")
    head = groups(manifests)["head"].template["spec"]
    assert "while grep -qszx '[s]erve' " in head["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
    assert head["containers"][1]["command"][1] == "serve"
    assert 3 * config(manifests).drain_timeout_s + STOP_MARGIN_S <= head["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("target", TARGETS)
def test_the_cluster_names_its_ray_and_asks_for_a_token(target: str) -> None:
    spec = ray_cluster_spec(render(target))
    assert spec["rayVersion"] == version("ray")
    assert spec["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize("target", TARGETS)
def test_clients_reach_the_gateways_by_a_service(target: str) -> None:
    manifests = render(target)
    service = next(m for m in of_kind(manifests, "Service") if m["metadata"]["name"] == "mobula")
    gateway = groups(manifests)["gateway"]
    assert service["spec"]["selector"].items() <= gateway.pod_labels.items()
    (port,) = service["spec"]["ports"]
    assert gateway.ports[port["targetPort"]] == config(manifests).gateway.port
    protocol = "https" if config(manifests).tls.clients else "kubernetes.io/h2c"
    assert (port["name"], port["appProtocol"]) == ("serve-grpc", protocol)


@pytest.mark.parametrize("target", TARGETS)
def test_an_eviction_takes_one_pod_of_a_role_at_a_time(target: str) -> None:
    manifests = render(target)
    budgets = {
        budget["spec"]["selector"]["matchLabels"]["app.kubernetes.io/component"]: budget["spec"]["minAvailable"]
        for budget in of_kind(manifests, "PodDisruptionBudget")
    }
    keeps_head = "gcsFaultToleranceOptions" not in ray_cluster_spec(manifests)  # else it comes back to the same cluster
    for role, group in groups(manifests).items():
        if group.replicas > 1 or (role == "head" and keeps_head):
            assert budgets.pop(role) == max(1, group.replicas - 1), role
    assert budgets == {}


@pytest.mark.parametrize("target", TARGETS)
def test_processes_of_a_role_are_spread_over_machines(target: str) -> None:
    for role, group in groups(render(target)).items():
        if role != "head":
            (spread,) = group.template["spec"]["topologySpreadConstraints"]
            assert spread["topologyKey"] == "kubernetes.io/hostname"
            assert spread["labelSelector"]["matchLabels"].items() <= group.pod_labels.items()


@pytest.mark.parametrize("target", TARGETS)
def test_every_pod_runs_with_as_few_rights_as_it_can(target: str) -> None:
    manifests = render(target)
    for pod in pods(manifests):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        scales = pod["metadata"]["name"] == "head" and ray_cluster_spec(manifests).get("enableInTreeAutoscaling", False)
        assert spec["automountServiceAccountToken"] is scales
        for container in spec["containers"]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("target", TARGETS)
def test_what_ray_writes_has_a_volume(target: str) -> None:
    for group in groups(render(target)).values():
        volumes = {volume["name"]: volume for volume in group.template["spec"]["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in group.container["volumeMounts"]}
        assert all("emptyDir" in mounts[path] for path in ("/tmp", "/tmp/ray", "/dev/shm"))
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"


@pytest.mark.parametrize("target", TARGETS)
def test_images_are_pinned_and_requests_are_limits(target: str) -> None:
    for pod in pods(render(target)):
        for container in pod["spec"]["containers"]:
            name, _, tag = container["image"].rpartition(":")
            assert name, container["image"]
            assert tag != "latest"
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert {"cpu", "memory"} <= set(container["resources"]["limits"])


@pytest.mark.parametrize("target", TARGETS)
def test_a_pod_may_take_as_long_to_end_as_its_drain(target: str) -> None:
    manifests = render(target)
    drain_s = config(manifests).drain_timeout_s
    for group in groups(manifests).values():
        assert group.template["spec"]["terminationGracePeriodSeconds"] >= drain_s + STOP_MARGIN_S


@pytest.mark.parametrize("target", TARGETS)
def test_a_pod_that_ends_hands_over_first_and_has_the_time_for_it(target: str) -> None:
    manifests = render(target)
    settings = config(manifests)
    for role, group in groups(manifests).items():
        if role == "head":
            continue
        command = group.container["lifecycle"]["preStop"]["exec"]["command"]
        assert command[:2] == ["mobula", "leave"]
        given = leave_arguments(command[2:])
        assert str(given["file"]) == settings.leave_file
        assert given["health_port"] == group.ports["health"]
        writable = [mount["mountPath"] for mount in group.container["volumeMounts"] if not mount.get("readOnly")]
        assert str(given["file"].parent) in writable
        assert settings.drain_timeout_s < given["timeout_s"]
        assert given["timeout_s"] + STOP_MARGIN_S <= group.template["spec"]["terminationGracePeriodSeconds"]


def leave_arguments(arguments: list[str]) -> dict[str, Any]:
    """As the command line reads them, without doing it."""
    group: Any = typer.main.get_command(app)
    return group.commands["leave"].make_context("leave", list(arguments)).params


@pytest.mark.parametrize("target", TARGETS)
def test_pod_knows_its_address(target: str) -> None:
    for group in groups(render(target)).values():
        variables: dict[str, Any] = {variable["name"]: variable for variable in group.container["env"]}
        assert variables["POD_IP"]["valueFrom"] == {"fieldRef": {"fieldPath": "status.podIP"}}


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_that_the_product_would_refuse_says_so(name: str) -> None:
    settings = config(render(f"overlays/{name}"))
    paths = [K8S / "overlays" / name / file for file in ("kustomization.yaml", "cluster.yaml")]
    firsts = [path.read_text(encoding="utf-8").splitlines()[0] for path in paths if path.exists()]
    assert [first.startswith("# A plan") for first in firsts] == [settings.expert_shards.device != "cpu"] * len(firsts)


def test_every_file_says_on_its_first_line_what_it_is_for() -> None:
    files = [path for path in K8S.rglob("*") if path.suffix in (".yaml", ".yml")]
    assert files
    assert [str(path) for path in files if not path.read_text(encoding="utf-8").startswith("# ")] == []


@pytest.mark.parametrize(
    "change",
    [
        lambda group: group.container["readinessProbe"]["grpc"].update(port=50052),
        lambda group: group.container["ports"].pop(0),
        lambda group: group.container["ports"][1].update(containerPort=9401),
    ],
    ids=["probe of another port", "port without a name", "metrics elsewhere"],
)
def test_a_probe_or_port_that_nothing_opens_is_noticed(change: Callable[[Group], object]) -> None:
    manifests = render("base")
    change(groups(manifests)["expert"])
    with pytest.raises((AssertionError, KeyError)):
        check_ports(manifests)
