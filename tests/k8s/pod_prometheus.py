"""A real Prometheus on one of the Pods' hosts: scrapes every Pod on the ports that the manifests name for metrics."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.k8s.pods import Pods

PORT = 9090
POD = "head-0"
# On the Pod: a list of queries on stdin, a list of their results on stdout.
ASK = """
import json, sys, urllib.parse, urllib.request
def ask(query):
    url = f"http://127.0.0.1:{sys.argv[1]}/api/v1/query?" + urllib.parse.urlencode({"query": query})
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)["data"]["result"]
print(json.dumps([ask(query) for query in json.load(sys.stdin)]))
"""


class PodPrometheus:
    """Started; ends with the Pods."""

    def __init__(self, pods: Pods, folder: Path) -> None:
        """Raises LookupError where this machine has no Prometheus."""
        program = shutil.which("prometheus")
        if program is None:
            raise LookupError("prometheus is not on this machine; Debian has a package of that name")
        self._pods = pods
        config = folder / "prometheus.yml"
        scrape = {"job_name": "mobula", "scrape_interval": "1s", "static_configs": targets(pods)}
        config.write_text(yaml.safe_dump({"scrape_configs": [scrape]}))
        options = [f"--config.file={config}", f"--storage.tsdb.path={folder}/tsdb"]
        pods.start(POD, "prometheus", [program, f"--web.listen-address=127.0.0.1:{PORT}", *options])

    def query(self, queries: list[str]) -> dict[str, list[dict[str, Any]]]:
        """PromQL's answers now, by query; [] while it does not answer."""
        asked = self._pods.run(POD, [sys.executable, "-c", ASK, str(PORT)], stdin=json.dumps(queries))
        answers = json.loads(asked.stdout) if asked.returncode == 0 else [[] for _ in queries]
        return dict(zip(queries, answers, strict=True))


def targets(pods: Pods) -> list[dict[str, Any]]:
    """Each with the labels and the path that the PodMonitor gives it."""
    groups = []
    for pod, role in pods.roles.items():
        if role != "head":
            groups.append(
                _group(role, pods.port(pod, "ep-metrics"), "/metrics/own" if role == "gateway" else "/metrics")
            )
        if role == "gateway":
            groups.append(_group("controller", pods.port(pod, "ctl-metrics"), "/metrics"))
    return groups


def _group(component: str, address: str, path: str) -> dict[str, Any]:
    return {"targets": [address], "labels": {"component": component, "__metrics_path__": path}}
