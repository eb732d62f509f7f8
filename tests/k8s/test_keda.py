"""What KEDA starts: Jobs that ask for a number of processes, and what Prometheus must say for that."""

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer
from click import Context

from cluster.commands.cli import app
from tests.k8s.crd_schemas import faults
from tests.k8s.manifests import Manifest, config, crd_folder, groups, of_kind, render_component

NAMES = ["mobula-fewer-shards", "mobula-fewer-workers", "mobula-more-shards", "mobula-more-workers"]


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    return render_component("keda", tmp_path_factory.mktemp("keda"))


@pytest.fixture(scope="module")
def jobs(manifests: list[Manifest]) -> dict[str, Manifest]:
    return {job["metadata"]["name"]: job for job in of_kind(manifests, "ScaledJob")}


def test_every_job_is_what_its_definition_says(jobs: dict[str, Manifest]) -> None:
    folder = crd_folder()
    assert sorted(jobs) == NAMES
    try:
        found = {name: faults(job, folder) for name, job in jobs.items()}
    except LookupError as error:
        pytest.skip(f"{error}; KEDA has it in config/crd/bases")
    assert found == {name: [] for name in NAMES}
    jobs["mobula-more-workers"]["spec"]["triggers"][0]["metdata"] = {}
    assert "'metdata' was unexpected" in faults(jobs["mobula-more-workers"], folder)[0]
    del jobs["mobula-more-workers"]["spec"]["triggers"][0]["metdata"]


@pytest.mark.parametrize("name", NAMES)
def test_a_job_runs_with_few_rights_and_asks_what_the_command_line_knows(
    jobs: dict[str, Manifest], manifests: list[Manifest], name: str
) -> None:
    spec = jobs[name]["spec"]["jobTargetRef"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": spec}
    kubernetes_validate.validate(job, "1.32", strict=True)
    (container,) = spec["template"]["spec"]["containers"]
    assert container["image"] == groups(manifests)["gateway"].container["image"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["command"] == ["mobula"]
    scale, role, *arguments = container["args"]
    command: Any = typer.main.get_command(app).commands[scale].commands[role]  # type: ignore[attr-defined]
    context: Context = command.make_context(role, list(arguments))
    assert context.params["count"] == (4 if "more" in name else 2)
    assert role == name.rpartition("-")[2]
    (service,) = [m for m in of_kind(manifests, "Service") if m["metadata"]["name"] == "mobula"]
    assert context.params["address"] == f"mobula:{service['spec']['ports'][0]['port']}"


def test_the_gateways_let_the_jobs_in(jobs: dict[str, Manifest], manifests: list[Manifest]) -> None:
    (policy,) = [m for m in of_kind(manifests, "NetworkPolicy") if m["metadata"]["name"] == "mobula-scaler"]
    (rule,) = policy["spec"]["ingress"]
    wanted = rule["from"][0]["podSelector"]["matchLabels"]
    for job in jobs.values():
        assert job["spec"]["jobTargetRef"]["template"]["metadata"]["labels"] == wanted
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= groups(manifests)["gateway"].pod_labels.items()
    assert rule["ports"] == [{"port": config(manifests).gateway.port}]


def test_no_two_jobs_of_a_role_can_be_wanted_at_once() -> None:
    """More workers are wanted while requests wait, fewer only when none did for longer; shards by one series' range."""
    folder = Path(__file__).parents[2] / "k8s" / "components" / "keda"
    workers, shards = (folder / "workers.yaml").read_text(), (folder / "shards.yaml").read_text()
    waiting = "(sum(mobula_gateway_requests_waiting) + sum(mobula_num_requests_waiting))"
    assert f"min_over_time({waiting}[1m:15s]) > bool 0" in workers
    assert f"max_over_time({waiting}[15m:1m]) == bool 0" in workers
    busiest = "max(rate(mobula_expert_compute_seconds_sum[1m]))"
    assert f"min_over_time({busiest}[2m:30s]) > bool 0.8" in shards
    assert f"max_over_time({busiest}[15m:1m]) < bool 0.3" in shards
