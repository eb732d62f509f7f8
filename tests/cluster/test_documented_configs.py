"""What the documentation and the manifests show as a configuration is one."""

import re
from pathlib import Path

import pytest
import yaml

from cluster.config import parse_config, read_config

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "k8s" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MANIFEST_FILES = sorted((ROOT / "k8s").rglob("cluster.yaml"))


def shown_configs() -> dict[str, str]:
    """Every block of YAML that is no Kubernetes object, by its page and line."""
    found = {}
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(r"^```ya?ml\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            if not re.search(r"^(kind|apiVersion):", match[1], re.MULTILINE):
                line = text[: match.start()].count("\n") + 1
                found[f"{page.relative_to(ROOT)}:{line}"] = match[1]
    return found


SHOWN = shown_configs()


def test_the_pages_that_explain_keys_show_them() -> None:
    assert {where.partition(":")[0] for where in SHOWN} >= {"README.md", "docs/configuration.md", "docs/experts.md"}
    assert MANIFEST_FILES


@pytest.mark.parametrize("where", SHOWN)
def test_a_configuration_that_a_page_shows_is_read(where: str) -> None:
    parse_config(yaml.safe_load(SHOWN[where]))


@pytest.mark.parametrize("path", MANIFEST_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_configuration_of_the_manifests_is_read(path: Path) -> None:
    read_config(path)
