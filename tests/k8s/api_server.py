"""A real API server for custom resources, on loopback: apiextensions-apiserver with an etcd, as build_api_server leaves
them. It knows no Pods, runs nothing, and says of each object what a cluster's would say.
"""

import json
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

START_S = 60.0
NAMESPACE = "default"
LOOPBACK = "127.0.0.1"
KUBECONFIG_OPTIONS = ("kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig")
CLIENT_FILES = {"certificate": "crt", "key": "key"}
DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


class ApiServer:
    """Running. Leaving the block ends it."""

    def __init__(self, programs: Path, folder: Path) -> None:
        """programs: the folder with both; folder: for their files."""
        self._programs = programs
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        self._port = _free_port()
        self._paths: dict[tuple[str, str], str] = {}  # of a kind in an API version

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in reversed(self._processes):
            process.terminate()
            process.wait(20.0)

    def define(self, folder: Path) -> None:
        """Adds the definitions in a folder's files, and waits until each is served."""
        for path in sorted(folder.glob("*.yaml")):
            for definition in filter(None, yaml.load_all(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)):
                spec = definition["spec"]
                status, answer = self._ask("POST", DEFINITIONS, definition)
                assert status == 201, answer
                for version in spec["versions"]:
                    if version["served"]:
                        api = f"{spec['group']}/{version['name']}"
                        folder_of = f"namespaces/{NAMESPACE}/" if spec["scope"] == "Namespaced" else ""
                        path = f"/apis/{api}/{folder_of}{spec['names']['plural']}"
                        self._paths[api, spec["names"]["kind"]] = path
        for path in self._paths.values():
            self._wait_until_served(path)

    def knows(self, manifest: dict[str, Any]) -> bool:
        return (manifest["apiVersion"], manifest["kind"]) in self._paths

    def refusal(self, manifest: dict[str, Any]) -> str:
        """Why it would not take the object; "" if it would. A dry run, with strict validation of fields."""
        path = f"{self._paths[manifest['apiVersion'], manifest['kind']]}?dryRun=All&fieldValidation=Strict"
        status, answer = self._ask("POST", path, manifest)
        return "" if status == 201 else str(answer.get("message", answer))

    def _wait_until_served(self, path: str) -> None:
        give_up_s = time.monotonic() + START_S
        while self._ask("GET", path)[0] != 200:
            assert time.monotonic() < give_up_s, f"{path} is not served"
            time.sleep(0.1)

    def _start(self) -> None:
        self._make_certificates()
        client, peer = (f"http://{LOOPBACK}:{_free_port()}" for _ in range(2))
        self._run(
            "etcd",
            f"--data-dir={self._folder / 'etcd-data'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
        )
        self._run(
            "apiextensions-apiserver",
            f"--etcd-servers={client}",
            f"--bind-address={LOOPBACK}",
            f"--secure-port={self._port}",
            f"--cert-dir={self._folder / 'serving'}",
            f"--client-ca-file={self._folder / 'ca.crt'}",
            "--authentication-skip-lookup",
            *(f"--{option}={self._kubeconfig()}" for option in KUBECONFIG_OPTIONS),
            "--enable-priority-and-fairness=false",
            "--disable-admission-plugins=NamespaceLifecycle,MutatingAdmissionPolicy,MutatingAdmissionWebhook,"
            "ValidatingAdmissionPolicy,ValidatingAdmissionWebhook",
        )
        give_up_s = time.monotonic() + START_S
        while not self._is_up():
            ended = [process.args for process in self._processes if process.poll() is not None]
            assert not ended, f"{ended[0]} ended: {self._last_words()}"
            assert time.monotonic() < give_up_s, self._last_words()
            time.sleep(0.2)

    def _last_words(self) -> str:
        return "\n".join(log.read_text(errors="replace")[-1500:] for log in sorted(self._folder.glob("*.log")))

    def _kubeconfig(self) -> Path:
        """Of the core API server, which the program wants to be told of; itself, for there is none."""
        path = self._folder / "kubeconfig"
        cluster = {"server": f"https://{LOOPBACK}:{self._port}", "insecure-skip-tls-verify": True}
        user = {f"client-{kind}": str(self._folder / f"client.{end}") for kind, end in CLIENT_FILES.items()}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "own", "cluster": cluster}],
            "users": [{"name": "test", "user": user}],
            "contexts": [{"name": "own", "context": {"cluster": "own", "user": "test"}}],
            "current-context": "own",
        }
        path.write_text(yaml.safe_dump(config))
        return path

    def _is_up(self) -> bool:
        try:
            return self._ask("GET", "/readyz/poststarthook/crd-informer-synced")[0] == 200
        except OSError:
            return False

    def _run(self, program: str, *options: str) -> None:
        with (self._folder / f"{program}.log").open("wb") as log:
            command = [str(self._programs / program), *options]
            self._processes.append(subprocess.Popen(command, stdout=log, stderr=log))

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE  # its own, made at its start
        context.load_cert_chain(self._folder / "client.crt", self._folder / "client.key")
        request = urllib.request.Request(f"https://{LOOPBACK}:{self._port}{path}", method=method)
        request.add_header("Content-Type", "application/json")
        data = json.dumps(body).encode() if body is not None else None
        try:
            with urllib.request.urlopen(request, data, timeout=30.0, context=context) as response:
                return response.status, _parsed(response.read())
        except urllib.error.HTTPError as error:
            return error.code, _parsed(error.read())

    def _make_certificates(self) -> None:
        """An authority, and a client of the group that may do everything."""
        subject = {"ca": "/CN=test", "client": "/O=system:masters/CN=test"}
        key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        self._openssl("req", "-x509", *key, "-subj", subject["ca"], "-keyout", "ca.key", "-out", "ca.crt", "-days", "1")
        self._openssl("req", *key, "-subj", subject["client"], "-keyout", "client.key", "-out", "client.csr")
        sign = ["-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "1"]
        self._openssl("x509", "-req", "-in", "client.csr", *sign, "-out", "client.crt")

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self._folder, check=True, capture_output=True)


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError:
        return {"message": data.decode(errors="replace")}
    return value if isinstance(value, dict) else {"message": value}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])
