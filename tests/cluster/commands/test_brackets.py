"""Names and texts with square brackets, which rich takes for markup, reach the terminal as they are."""

from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console, RenderableType
from typer.testing import CliRunner

from cluster.checkpoint.accuracy import Accuracy
from cluster.client import Generation
from cluster.commands import serve
from cluster.commands.checkpoint_command import accuracy_view
from cluster.commands.cli import app
from cluster.commands.plan_view import plan_view
from cluster.commands.views import summary_view
from cluster.config import parse_config
from cluster.roles.preflight import check
from tests.checkpoints import write_checkpoint

CLOSING, SWALLOWED = "[/model]", "[v2]"  # the one is an error of markup, the other vanishes


def text_of(view: RenderableType) -> str:
    console: Any = Console(file=StringIO(), width=400)
    console.print(view)
    return str(console.file.getvalue())


@pytest.mark.parametrize("name", [CLOSING, SWALLOWED])
def test_the_plan_shows_a_models_folder(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(Path(f"{tmp_path}/{name}"))
    assert f"{folder} (deepseek" in text_of(plan_view(check(parse_config({"model": str(folder)}))))


def test_the_banner_shows_folders_and_addresses_with_a_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve.sys, "argv", [f"{CLOSING}/mobula"])
    config = parse_config({"model": "m/[v2]", "tls": {"clients": "/[/certs]"}})
    address = "[fe80::1]:5000"
    deployment: Any = SimpleNamespace(config=config, address=address, metrics_address=address)
    console: Any = Console(file=StringIO(), width=400)
    serve._print_banner(deployment, console)
    text = console.file.getvalue()
    assert f"serving m/[v2] at {address}" in text
    assert f"[/model]/mobula --tls-ca /[/certs]/ca.crt status --address {address}" in text
    assert f"://{address}/metrics" in text


@pytest.mark.parametrize("name", [CLOSING, SWALLOWED])
def test_a_comparison_names_both_checkpoints(name: str) -> None:
    accuracy = Accuracy(
        num_tokens=2,
        reference_perplexity=1.0,
        candidate_perplexity=1.0,
        greedy_agreement=1.0,
        median_logit_error=0.0,
        max_logit_error=0.0,
    )
    assert f"{name}/int4 against {name}, 2 tokens" in text_of(accuracy_view(accuracy, name, f"{name}/int4"))


def test_a_prompt_is_shown_as_it_was_given() -> None:
    assert "x = [y]" in text_of(summary_view([Generation("x = [y]")], 1.0))


@pytest.mark.parametrize("name", [CLOSING, SWALLOWED])
def test_the_folder_of_certificates_is_named(tmp_path: Path, name: str) -> None:
    folder = f"{tmp_path}/{name}"
    result = CliRunner().invoke(app, ["certs", "make", folder], env={"COLUMNS": "400"})
    assert result.exit_code == 0, result.output
    assert result.output.replace("\n", "").count(name) == 3
