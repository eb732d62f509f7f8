"""The repository checks its own rules."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("attention", "cluster", "experts", "protos", "router")
MAX_LINES = 400


def python_files(*names: str) -> list[Path]:
    folders = [ROOT / name for name in names]
    return [path for folder in folders for path in folder.rglob("*.py") if "_pb2" not in path.name]


def test_no_file_is_longer_than_four_hundred_lines() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in python_files(*PACKAGES, "tests")}
    assert {str(path): length for path, length in lengths.items() if length > MAX_LINES} == {}


def test_every_module_says_what_it_is() -> None:
    silent = [
        str(path)
        for path in python_files(*PACKAGES)
        if path.name != "__init__.py" and not path.read_text(encoding="utf-8").startswith(('"""', "#!"))
    ]
    assert silent == []


def test_architecture_is_read_in_one_sitting() -> None:
    assert len((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").splitlines()) <= 80


def test_only_three_files_make_channels_and_servers() -> None:
    """So that none is made without certificates and limits."""
    pattern = re.compile(r"\b(insecure|secure)_channel\(|add_(in)?secure_port\(|grpc(\.aio)?\.server\(")
    makers = {str(path.relative_to(ROOT)) for path in python_files(*PACKAGES) if pattern.search(path.read_text())}
    assert makers == {"protos/credentials.py", "protos/mutual_tls.py", "cluster/client_access.py"}


def test_nothing_reads_what_could_run_code() -> None:
    pattern = re.compile(
        r"\bpickle\.|import pickle|cloudpickle|torch\.load\(|allow_pickle=True|marshal\.load|shelve\.|dill\b"
    )
    assert [str(path) for path in python_files(*PACKAGES) if pattern.search(path.read_text())] == []


def test_imports_keep_the_contracts() -> None:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--config", str(ROOT / "pyproject.toml")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_generated_code_is_what_the_protos_say(tmp_path: Path) -> None:
    protos = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "protos").glob("*.proto"))
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", f"--python_out={tmp_path}", f"--pyi_out={tmp_path}"]
    subprocess.run([*command, f"--grpc_python_out={tmp_path}", *protos], cwd=ROOT, check=True)
    for generated in (tmp_path / "protos").iterdir():
        assert generated.read_text() == (ROOT / "protos" / generated.name).read_text(), f"{generated.name}: make protos"


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md", "ARCHITECTURE.md"])
def test_links_between_documents_lead_somewhere(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    targets = [part.split(")")[0] for part in text.split("](")[1:]]
    missing = [target for target in targets if "://" not in target and not (ROOT / target.split("#")[0]).exists()]
    assert missing == []
