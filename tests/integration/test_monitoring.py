"""A real Prometheus over a system under load: every query of every board has data, and an alert lives its life.

What Prometheus finds it finds by the gateway's /sd, as on a Ray cluster without Kubernetes. Rules are those of k8s/,
with their minutes made seconds.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from prometheus_client import CollectorRegistry, make_wsgi_app

from cluster.config import RebalancingConfig
from cluster.controller import balance
from cluster.controller.controller import Controller
from cluster.controller.metrics import ControllerMetrics
from cluster.controller.rebalance import RebalanceCause, RebalanceState
from cluster.gateway.http_server import serve_http
from cluster.roles.actors import _proposer
from tests.checkpoints import write_checkpoint
from tests.integration.test_live_rebalance import controlled
from tests.prometheus_server import HttpApi, alertmanager, prometheus
from tests.system import HOST, System

MONITORING = Path(__file__).parents[2] / "k8s" / "components" / "monitoring"
TIMEOUT_S = 60.0
ALERT = "MobulaLoadImbalance"
ONE_KIND = [[30] * 8] * 3  # prompts that ask for few experts
EVEN_ENOUGH = 0.67  # the alert's threshold


class Watched(NamedTuple):
    """What the tests look at."""

    system: System
    controller: Controller
    metrics: HttpApi
    alerts: HttpApi


def hasty(text: str) -> str:
    """Rules with hours and minutes made seconds: a loop of half an hour takes half a minute."""
    text = re.sub(r"\[\d+[mh]\]", "[6s]", text)
    text = re.sub(r"for: \d+m", "for: 2s", text)
    return re.sub(r"interval: \d+s", "interval: 1s", text)


def scrape_config(gateway: str, rules: Path, alerts: HttpApi) -> dict[str, Any]:
    return {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(rules)],
        "alerting": {"alertmanagers": [{"static_configs": [{"targets": [alerts.address]}]}]},
        "scrape_configs": [
            {"job_name": "mobula", "http_sd_configs": [{"url": f"http://{gateway}/sd", "refresh_interval": "1s"}]}
        ],
    }


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("monitoring")
    model = write_checkpoint(tmp_path_factory.mktemp("model"), "v2", seed=4)
    rules = folder / "rules.yml"
    rules.write_text(hasty(yaml.safe_dump(yaml.safe_load((MONITORING / "rules.yaml").read_text())["spec"])))
    with pytest.MonkeyPatch.context() as patch, alertmanager(folder) as alerts:
        patch.setattr(balance, "LOAD_INTERVAL_S", 0.2)
        with (
            System(model, num_workers=1, num_shards=6) as system,
            controlled(
                system, _proposer(system.config, system.plan.placement_request), RebalancingConfig(half_life_s=3.0)
            ) as (controller, _),
        ):
            tell_gateway(system, controller)
            gateway = system.gateway.health().metrics_address
            with prometheus(folder, scrape_config(gateway, rules, alerts)) as metrics:
                yield Watched(system, controller, metrics, alerts)


def tell_gateway(system: System, controller: Controller) -> None:
    """Of the controller's metrics too."""
    registry = CollectorRegistry()
    ControllerMetrics(
        registry,
        gate=system.plan.placement_request.gate,
        status=controller.status,
        traffic=controller.traffic,
        num_rebalances=controller.num_rebalances,
        has_expert_series=True,
    )
    _, port = serve_http(HOST, 0, make_wsgi_app(registry))
    members = {f"worker-{rank}": worker for rank, worker in enumerate(system.workers)}
    members |= {f"shard-{rank}": shard for rank, shard in enumerate(system.shards)}
    addresses = {name: role.health().metrics_address for name, role in members.items()}
    workers = {rank: worker.health().address for rank, worker in enumerate(system.workers)}
    system.gateway.update_members(workers, addresses | {"controller": f"{HOST}:{port}"})


@contextmanager
def traffic(system: System) -> Iterator[None]:
    """Requests of one kind, again and again."""
    done = threading.Event()

    def send() -> None:
        while not done.is_set():
            system.greedy_at_once(ONE_KIND, 8)

    thread = threading.Thread(target=send, name="traffic")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def wait_for(condition: Callable[[], bool], what: str) -> None:
    give_up_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < give_up_s, what
        time.sleep(0.2)


def marked_causes(metrics: HttpApi) -> set[str]:
    """Of the rebalances that boards mark now."""
    boards = [json.loads(path.read_text()) for path in (MONITORING / "boards").glob("*.json")]
    queries = {annotation["expr"] for board in boards for annotation in board["annotations"]["list"]}
    assert len(queries) == len(RebalanceCause)
    return {result["metric"]["cause"] for query in queries for result in metrics.query(query)}


def is_firing(alerts: HttpApi) -> bool:
    active = alerts.get("/api/v2/alerts", active="true")
    return any(alert["labels"]["alertname"] == ALERT and alert["status"]["state"] == "active" for alert in active)


def test_imbalance_fires_an_alert_that_a_rebalance_ends(watched: Watched) -> None:
    system, controller, metrics, alerts = watched
    assert not is_firing(alerts)
    with traffic(system):
        wait_for(lambda: is_firing(alerts), f"uneven load raises {ALERT}")
        before = float(metrics.query("mobula_expert_load_total_balancedness")[0]["value"][1])
        assert before < EVEN_ENOUGH
        controller.rebalance()
        wait_for(lambda: controller.status().rebalance.state is RebalanceState.IDLE, "the rebalance ends")
        assert controller.status().rebalance.num_done == 1
        wait_for(lambda: marked_causes(metrics) == {"by_hand"}, "boards mark the rebalance")
        wait_for(lambda: not is_firing(alerts), f"{ALERT} ends")
        after = float(metrics.query("mobula_expert_load_total_balancedness")[0]["value"][1])
    assert after > EVEN_ENOUGH
    firing = {result["metric"]["alertname"] for result in metrics.query('ALERTS{alertstate="firing"}')}
    assert firing <= {"MobulaFirstTokensSlow", "MobulaTokensSlow"}  # a busy machine may be slow


@pytest.mark.parametrize("board", ["experts", "serving", "cluster"])
def test_every_query_of_a_board_has_data(watched: Watched, board: str) -> None:
    panels = json.loads((MONITORING / "boards" / f"{board}.json").read_text())["panels"]
    queries = {panel["title"]: [target["expr"] for target in panel["targets"]] for panel in panels}

    def empty() -> list[str]:
        return [
            f"{title}: {query}"
            for title, expressions in queries.items()
            for query in expressions
            if not watched.metrics.query(query.replace("$__rate_interval", "20s").replace("$__range", "1m"))
        ]

    with traffic(watched.system):
        wait_for(lambda: empty() == [], f"no data for {empty()}")


def test_what_keda_asks_has_an_answer(watched: Watched) -> None:
    """Its windows made seconds."""
    files = [MONITORING.parent / "keda" / name for name in ("workers.yaml", "shards.yaml")]
    jobs = [job for path in files for job in yaml.safe_load_all(path.read_text())]
    queries = [trigger["metadata"]["query"] for job in jobs for trigger in job["spec"]["triggers"]]
    assert len(queries) == 4
    queries = [re.sub(r"\[\d+m\]", "[6s]", re.sub(r"\[\d+m:\d+[ms]\]", "[6s:1s]", query)) for query in queries]
    with traffic(watched.system):
        wait_for(lambda: all(watched.metrics.query(query) for query in queries), f"an answer to each of {queries}")
    assert {watched.metrics.query(query)[0]["value"][1] for query in queries} <= {"0", "1"}


def test_every_record_has_data(watched: Watched) -> None:
    groups = yaml.safe_load((MONITORING / "rules.yaml").read_text())["spec"]["groups"]
    names = [rule["record"] for group in groups for rule in group["rules"] if "record" in rule]
    with traffic(watched.system):
        wait_for(lambda: all(watched.metrics.query(name) for name in names), "every record has a value")


def test_the_boards_are_what_the_generator_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("grafana_foundation_sdk", reason="the extra `boards` is not installed")
    monkeypatch.syspath_prepend(str(MONITORING / "boards"))
    import generate  # type: ignore[import-not-found]

    for name in generate.BOARDS:
        assert (MONITORING / "boards" / f"{name}.json").read_text(encoding="utf-8") == generate.build(name), (
            f"{name}.json is not what generate.py writes: run it"
        )


def test_every_panel_asks_the_boards_source_and_has_a_query() -> None:
    for path in (MONITORING / "boards").glob("*.json"):
        for panel in json.loads(path.read_text())["panels"]:
            assert panel["datasource"]["uid"] == "${source}", panel["title"]
            assert panel["targets"], panel["title"]
