"""The Dockerfile as steps that can run without Docker: the files it copies, the commands of a stage."""

import fnmatch
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.k8s.manifests import ROOT


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """One line of a Dockerfile, continued lines joined."""

    stage: int  # 0 for the first FROM, -1 before it
    name: str  # RUN, COPY ...
    value: str


def instructions(path: Path = ROOT / "Dockerfile") -> list[Instruction]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    found, stage = [], -1
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        name, _, value = line.strip().partition(" ")
        if name:
            stage += name == "FROM"
            found.append(Instruction(stage=stage, name=name, value=value.strip()))
    return found


def arguments(stage: int) -> dict[str, str]:
    """Build arguments of a stage with their defaults."""
    pairs = (i.value.partition("=") for i in instructions() if i.name == "ARG" and i.stage == stage)
    return {name: value for name, _, value in pairs}


def variables(stage: int) -> dict[str, str]:
    """Environment variables that a stage sets."""
    pairs = [p.partition("=") for i in instructions() if i.name == "ENV" and i.stage == stage for p in i.value.split()]
    return {name: value for name, _, value in pairs}


def copy_context(target: Path) -> None:
    """What `COPY .` copies: everything that .dockerignore lets through."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    kept = [line.removeprefix("!") for line in lines if line.startswith("!")]
    left_out = [line.removeprefix("**/") for line in lines if line.startswith("**/")]
    assert lines == ["*", *(f"!{name}" for name in kept), *(f"**/{pattern}" for pattern in left_out)], "a simple file"
    target.mkdir()
    for name in kept:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns(*left_out))
        elif not any(fnmatch.fnmatch(name, pattern) for pattern in left_out):
            shutil.copy2(source, target / name)
