"""Hosts on one machine: network namespaces around a bridge, each with its own processes, /dev/shm and folder for Ray.

Needs root, `ip` of iproute2, `unshare` and `nsenter` of util-linux. Nothing is set up outside of the namespaces, which
are gone with the block. Knows nothing of Ray.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

NETWORK = "10.77.0"
NOWHERE = "02:00:00:00:00:99"  # nobody's hardware address: a frame to it is lost without a word
# What a host's first process does; its end is the end of the host. $0: the host's folder, $1: where it is seen.
INIT = """
mount --make-rprivate /
mount -t tmpfs -o size=1g tmpfs /dev/shm
mount --bind "$0" "$1"
ip link set lo up
echo up
exec sleep infinity
"""


def missing() -> str:
    """Why hosts cannot be made here; "" if they can."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    tools = [tool for tool in ("ip", "unshare", "nsenter") if shutil.which(tool) is None]
    if tools:
        return f"needs {' and '.join(tools)} (iproute2, util-linux)"
    probe = f"mobula-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"needs the right to make network namespaces: {made.stderr.strip()}"
    _ip("netns", "delete", probe)
    return ""


class Host:
    """One of them. folder: where its processes have Ray's files, the same path on every host, each its own files."""

    def __init__(self, name: str, number: int, folder: Path, switch: str) -> None:
        self.name = name
        self.address = f"{NETWORK}.{number}"
        self.folder = folder / "host"
        self._switch = switch
        self._port = f"v{number}"
        self.namespace = f"{switch}-{name}"
        _ip("netns", "add", self.namespace)
        _ip("-n", switch, "link", "add", self._port, "type", "veth", "peer", "name", "eth0", "netns", self.namespace)
        _ip("-n", switch, "link", "set", self._port, "master", "bridge", "up")
        _ip("-n", self.namespace, "address", "add", f"{self.address}/24", "dev", "eth0")
        _ip("-n", self.namespace, "link", "set", "eth0", "up")
        own = folder / name
        own.mkdir()
        namespaces = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._init = subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, *namespaces, "sh", "-ec", INIT, str(own), str(self.folder)],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._init.stdout
        assert self._init.stdout.readline() == "up\n"
        self._pid = int(Path(f"/proc/{self._init.pid}/task/{self._init.pid}/children").read_text().split()[0])

    def command(self, command: Sequence[str]) -> list[str]:
        """That runs this on the host."""
        return ["nsenter", "--target", str(self._pid), "--mount", "--uts", "--ipc", "--net", "--pid", "--", *command]

    def start(self, command: Sequence[str], environment: Mapping[str, str], **options: object) -> subprocess.Popen[str]:
        """A process on the host."""
        return subprocess.Popen(self.command(command), env=dict(environment), text=True, **options)  # type: ignore[call-overload, no-any-return]

    def cut_off(self) -> None:
        """Nothing reaches it and nothing leaves it."""
        _ip("-n", self._switch, "link", "set", self._port, "down")

    def cut_on(self) -> None:
        """Undoes cut_off."""
        _ip("-n", self._switch, "link", "set", self._port, "up")

    def lose_what_is_sent_to(self, others: Sequence["Host"]) -> None:
        """It hears the others, and they hear nothing of it."""
        for other in others:
            _ip(*self._neighbour("replace", other), "lladdr", NOWHERE, "nud", "permanent")

    def lose_nothing(self, others: Sequence["Host"]) -> None:
        """Undoes it."""
        for other in others:
            _ip(*self._neighbour("delete", other))

    def _neighbour(self, verb: str, other: "Host") -> tuple[str, ...]:
        return ("-n", self.namespace, "neighbour", verb, other.address, "dev", "eth0")

    def end(self) -> None:
        """As a power cut: every process is gone at once."""
        os.killpg(self._init.pid, signal.SIGKILL)
        self._init.wait()


class Hosts:
    """A bridge and hosts by name."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._folder = folder
        self._names = names
        self._switch = f"mobula-{os.getpid()}"
        self.hosts: dict[str, Host] = {}

    def __enter__(self) -> Self:
        _ip("netns", "add", self._switch)
        (self._folder / "host").mkdir()
        try:
            _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "bridge", "up")
            for number, name in enumerate(self._names, start=1):
                self.hosts[name] = Host(name, number, self._folder, self._switch)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for host in self.hosts.values():
            host.end()
        time.sleep(0.1)
        for namespace in (*(host.namespace for host in self.hosts.values()), self._switch):
            _ip("netns", "delete", namespace)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
