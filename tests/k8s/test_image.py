"""The image: what it is built from agrees with the manifests, and each install step works in an empty environment."""

import os
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.k8s.dockerfile import arguments, copy_context, instructions, variables
from tests.k8s.manifests import ROOT, groups, ray_cluster_spec, render

NEEDS_ROOT = ("apt-get ", "useradd ")  # steps that only an image can take
INSTALL_TIMEOUT_S = 900.0


def test_image_has_the_ray_and_the_user_of_the_manifests() -> None:
    manifests = render("base")
    assert arguments(0)["RAY_VERSION"] == ray_cluster_spec(manifests)["rayVersion"]
    assert arguments(0)["TORCH_VERSION"] == version("torch").partition("+")[0]
    (user,) = [instruction.value for instruction in instructions() if instruction.name == "USER"]
    for group in groups(manifests).values():
        security = group.template["spec"]["securityContext"]
        assert user == f"{security['runAsUser']}:{security['runAsGroup']}"


def test_stages_start_from_one_pinned_image() -> None:
    images = [instruction.value.split(" ")[0] for instruction in instructions() if instruction.name == "FROM"]
    assert images == ["${PYTHON_IMAGE}"] * 2
    assert arguments(-1)["PYTHON_IMAGE"].count(".") == 2  # to the patch release


def test_image_is_made_of_every_package_and_nothing_else(tmp_path: Path) -> None:
    copy_context(tmp_path / "src")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = {name.partition(".")[0] for name in project["tool"]["setuptools"]["packages"]}
    copied = {path.name for path in (tmp_path / "src").iterdir()}
    assert copied == packages | {"LICENSE", "README.md", "pyproject.toml"}
    for extension in project["tool"]["setuptools"]["ext-modules"]:
        for name in (*extension["sources"], *extension.get("depends", ())):
            assert (tmp_path / "src" / name).is_file(), name
    assert list((tmp_path / "src").rglob("*.so")) == []


@pytest.mark.image
@pytest.mark.timeout(INSTALL_TIMEOUT_S)
def test_every_install_step_of_the_image_works_in_an_empty_environment(tmp_path: Path) -> None:
    copy_context(tmp_path / "src")
    places = {"/opt/mobula": tmp_path / "venv", "/src": tmp_path / "src", "/wheels": tmp_path / "wheels"}

    def moved(text: str) -> str:
        for place, here in places.items():
            text = text.replace(place, str(here))
        return text

    path = os.environ["PATH"]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= arguments(0) | {name: moved(value).replace("$PATH", path) for name, value in variables(0).items()}
    steps = [i.value for i in instructions() if i.name == "RUN" and i.stage == 0 and not i.value.startswith(NEEDS_ROOT)]
    assert len(steps) >= 6
    for step in steps:
        result = subprocess.run(
            ["sh", "-c", moved(step)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=INSTALL_TIMEOUT_S,
        )
        assert result.returncode == 0, f"{step}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    assert result.stdout.strip() == f"mobula {version('mobula-serve')}"
