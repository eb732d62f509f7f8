"""The alert rules against made-up series, by Prometheus' own promtool: each fires when it should, and only then."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from cluster.dashboard.discovery import OWN_PATH
from tests.k8s.manifests import K8S, ROOT, groups, render

RULES = yaml.safe_load((K8S / "components" / "monitoring" / "rules.yaml").read_text(encoding="utf-8"))["spec"]
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"] if "alert" in rule]

Series = dict[str, str]  # name with labels -> values in promtool's notation, one a minute


class Case(NamedTuple):
    """alert fires `at` for labels, or for none when labels is None."""

    alert: str
    at: str
    series: Series
    labels: dict[str, str] | None


def busy(**more: str) -> Series:
    """Assignments are counted, all day."""
    return {'mobula_ep_rank_assignments_total{ep_rank="0"}': "0+600x160"} | more


def histogram(name: str, bound: str, slow: int) -> Series:
    """100 observations a minute, so many of them above the bound."""
    return {f'{name}_bucket{{le="{bound}"}}': f"0+{100 - slow}x160", f"{name}_count": "0+100x160"}


def left_out(**totals: str) -> Series:
    """Of worker 0."""
    return {f'mobula_{kind}_assignments_total{{dp_rank="0"}}': values for kind, values in totals.items()}


def waiting(gateway: str, worker: str, refused_by: str = "") -> Series:
    """Requests that wait there; one a second is refused if there is a reason for it."""
    series = {"mobula_gateway_requests_waiting": gateway, 'mobula_num_requests_waiting{dp_rank="0"}': worker}
    refused = {f'mobula_gateway_sheds_total{{reason="{refused_by}"}}': "0+60x40"} if refused_by else {}
    return series | refused


TTFT, ITL = "mobula_time_to_first_token_seconds", "mobula_inter_token_latency_seconds"
UNEVEN, EVEN = "0.5+0x160", "0.9+0x160"
CASES = [
    Case("MobulaLoadImbalance", "20m", busy(mobula_expert_load_total_balancedness=UNEVEN), {}),
    Case("MobulaLoadImbalance", "10m", busy(mobula_expert_load_total_balancedness=UNEVEN), None),
    Case("MobulaLoadImbalance", "20m", busy(mobula_expert_load_total_balancedness=EVEN), None),
    Case("MobulaLoadImbalance", "20m", {"mobula_expert_load_total_balancedness": UNEVEN}, None),
    Case(
        "MobulaDeviceLimitViolated",
        "6m",
        {'mobula_device_limit_violations_total{dp_rank="1"}': "0 0 0 0 1 1 1 1"},
        {"dp_rank": "1"},
    ),
    Case("MobulaDeviceLimitViolated", "6m", {'mobula_device_limit_violations_total{dp_rank="1"}': "0+0x20"}, None),
    Case("MobulaDroppedAssignments", "20m", left_out(dropped="0+60x30", missing="0x30"), {"dp_rank": "0"}),
    Case("MobulaDroppedAssignments", "20m", left_out(dropped="0x30", missing="0+60x30"), {"dp_rank": "0"}),
    Case("MobulaDroppedAssignments", "20m", left_out(dropped="7x30", missing="7x30"), None),
    Case("MobulaNoSuccessfulRebalance", "150m", {"mobula_expert_load_total_balancedness": UNEVEN}, {}),
    Case(
        "MobulaNoSuccessfulRebalance",
        "150m",
        {"mobula_expert_load_total_balancedness": UNEVEN, "mobula_rebalance_age_seconds": "9000+60x200"},
        {},
    ),
    Case(
        "MobulaNoSuccessfulRebalance",
        "150m",
        {"mobula_expert_load_total_balancedness": UNEVEN, "mobula_rebalance_age_seconds": "60+0x200"},
        None,
    ),
    Case("MobulaNoSuccessfulRebalance", "150m", {"mobula_expert_load_total_balancedness": EVEN}, None),
    Case(
        "MobulaRebalancesAborted",
        "60m",
        {'mobula_rebalances_total{outcome="aborted"}': "0x10 1x10 2x10 4x40"},
        {"outcome": "aborted"},
    ),
    Case("MobulaRebalancesAborted", "60m", {'mobula_rebalances_total{outcome="done"}': "0+1x60"}, None),
    Case(
        "MobulaProcessDown",
        "5m",
        {'up{job="mobula",component="expert",instance="a"}': "0x10"},
        {"job": "mobula", "component": "expert", "instance": "a"},
    ),
    Case("MobulaProcessDown", "5m", {'mobula_process_up{process="shard-1"}': "0x10"}, {"process": "shard-1"}),
    Case("MobulaProcessDown", "5m", {'up{job="mobula",component="controller",instance="b"}': "0x10"}, None),
    Case("MobulaControllerDown", "10m", {"up": "1x20"}, {}),
    Case("MobulaControllerDown", "10m", {"mobula_controller_placement_version": "1x20"}, None),
    Case(
        "MobulaShardQuarantined",
        "10m",
        {'mobula_shard_is_quarantined{ep_rank="2",dp_rank="0"}': "0x2 1x20"},
        {"ep_rank": "2"},
    ),
    Case("MobulaShardQuarantined", "10m", {'mobula_quarantined_units{ep_rank="3"}': "2x20"}, {"ep_rank": "3"}),
    Case(
        "MobulaShardQuarantined",
        "10m",
        {'mobula_shard_is_quarantined{ep_rank="3"}': "0x20", 'mobula_quarantined_units{ep_rank="3"}': "2x20"},
        {"ep_rank": "3"},
    ),
    Case("MobulaShardQuarantined", "10m", {'mobula_shard_is_quarantined{ep_rank="2"}': "1x3 0x20"}, None),
    Case(
        "MobulaRedundancyLost",
        "15m",
        {'mobula_expert_units{ep_rank="0"}': "5x20", "mobula_expert_shards": "2x20"},
        {},
    ),
    Case(
        "MobulaRedundancyLost",
        "15m",
        {
            'mobula_expert_units{ep_rank="0"}': "5x20",
            'mobula_expert_units{ep_rank="1"}': "5x20",
            "mobula_expert_shards": "2x20",
        },
        None,
    ),
    Case(
        "MobulaCertificateExpires",
        "20m",
        {'mobula_certificate_expiry_timestamp_seconds{process="shard-0"}': "100000x30"},
        {"process": "shard-0"},
    ),
    Case(
        "MobulaCertificateExpires",
        "20m",
        {'mobula_certificate_expiry_timestamp_seconds{process="shard-0"}': "1000000x30"},
        None,
    ),
    Case("MobulaLatentCacheFull", "30m", {'mobula_latent_cache_usage_ratio{dp_rank="0"}': "0.99x40"}, {"dp_rank": "0"}),
    Case("MobulaLatentCacheFull", "30m", {'mobula_latent_cache_usage_ratio{dp_rank="0"}': "0.5x40"}, None),
    Case("MobulaQueueGrows", "30m", waiting(gateway="1+1x40", worker="8x40"), {}),
    Case("MobulaQueueGrows", "30m", waiting(gateway="0x40", worker="1+1x40"), {}),
    Case("MobulaQueueGrows", "30m", waiting(gateway="9x40", worker="8x40", refused_by="wait"), {}),
    Case("MobulaQueueGrows", "30m", waiting(gateway="9x40", worker="8x40", refused_by="client"), None),
    Case("MobulaQueueGrows", "30m", waiting(gateway="9x40", worker="8x40"), None),
    Case("MobulaQueueGrows", "30m", waiting(gateway="0x40", worker="8x40"), None),
    Case("MobulaFirstTokensSlow", "70m", histogram(TTFT, "2.5", slow=20), {}),
    Case("MobulaFirstTokensSlow", "40m", histogram(TTFT, "2.5", slow=8), {}),
    Case("MobulaFirstTokensSlow", "70m", histogram(TTFT, "2.5", slow=1), None),
    Case("MobulaTokensSlow", "70m", histogram(ITL, "0.1", slow=20), {}),
    Case("MobulaTokensSlow", "70m", histogram(ITL, "0.1", slow=0), None),
    Case(
        "MobulaRequestsFail",
        "20m",
        {
            'mobula_gateway_requests_total{code="OK"}': "0+90x40",
            'mobula_gateway_requests_total{code="UNAVAILABLE"}': "0+10x40",
        },
        {},
    ),
    Case(
        "MobulaRequestsFail",
        "20m",
        {
            'mobula_gateway_requests_total{code="OK"}': "0+90x40",
            'mobula_gateway_requests_total{code="CANCELLED"}': "0+10x40",
        },
        None,
    ),
]


def promtool(*arguments: str | Path) -> None:
    path = shutil.which("promtool")
    if path is None:
        pytest.skip("promtool is not on this machine; Debian's package prometheus has it")
    result = subprocess.run([path, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr


def rules_without_words(folder: Path) -> Path:
    """The rules as Prometheus reads them. Annotations go: promtool compares them letter by letter."""
    groups = [
        group
        | {"rules": [{key: value for key, value in rule.items() if key != "annotations"} for rule in group["rules"]]}
        for group in RULES["groups"]
    ]
    path = folder / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": groups}))
    return path


def unit_test(case: Case) -> dict[str, Any]:
    """In promtool's format."""
    severity = next(rule["labels"] for rule in ALERTS if rule["alert"] == case.alert)
    fires = [] if case.labels is None else [{"exp_labels": severity | case.labels}]
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in case.series.items()],
        "alert_rule_test": [{"eval_time": case.at, "alertname": case.alert, "exp_alerts": fires}],
    }


def test_prometheus_takes_the_rules(tmp_path: Path) -> None:
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump(RULES))
    promtool("check", "rules", path)


def test_alerts_fire_when_they_should_and_only_then(tmp_path: Path) -> None:
    rules = rules_without_words(tmp_path)
    tests = {"rule_files": [str(rules)], "evaluation_interval": "1m", "tests": [unit_test(case) for case in CASES]}
    path = tmp_path / "tests.yml"
    path.write_text(yaml.safe_dump(tests))
    promtool("test", "rules", path)


def test_every_alert_is_tried_both_ways() -> None:
    names = {rule["alert"] for rule in ALERTS}
    assert {case.alert for case in CASES if case.labels is not None} == names
    assert {case.alert for case in CASES if case.labels is None} == names


def test_every_alert_has_a_runbook() -> None:
    text = (ROOT / "docs" / "runbooks.md").read_text(encoding="utf-8")
    sections = {f"docs/runbooks.md#{name.lower()}" for name in re.findall(r"^## (\w+)$", text, flags=re.MULTILINE)}
    assert {rule["annotations"]["runbook"] for rule in ALERTS} == sections
    for rule in ALERTS:
        assert rule["annotations"]["runbook"].endswith(f"#{rule['alert'].lower()}")


def test_the_monitor_finds_every_port_with_metrics_and_no_series_twice() -> None:
    text = (K8S / "components" / "monitoring" / "podmonitor.yaml").read_text(encoding="utf-8")
    monitor = yaml.safe_load(text)["spec"]
    endpoints = {endpoint["port"]: endpoint for endpoint in monitor["podMetricsEndpoints"]}
    found = [group for group in groups(render("base")).values() if "ep-metrics" in group.ports]
    assert set(endpoints) == {name for group in found for name in group.ports if name in ("ep-metrics", "ctl-metrics")}
    (chosen,) = monitor["selector"]["matchExpressions"]
    assert {group.pod_labels["app.kubernetes.io/component"] for group in found} == set(chosen["values"])
    own = endpoints["ep-metrics"]["relabelings"][-1]
    assert (own["regex"], own["replacement"]) == ("gateway", OWN_PATH)
