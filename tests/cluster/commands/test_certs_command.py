"""`mobula certs`, where something is wrong: one line that names it, and nothing is written."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.commands.cli import app
from protos.certificates import CertificateFolder
from tests.certificates import make_authority


def error(*arguments: str | Path) -> str:
    """The one line that the command ends with."""
    result = CliRunner().invoke(app, ["certs", *map(str, arguments)])
    assert result.exit_code == 1, result.output
    (line,) = result.output.splitlines()
    return line.removeprefix("error: ")


@pytest.mark.parametrize(
    "name",
    [
        "bad name!*",
        "x" * 300,
        "x" * 64,
        ".".join(["x" * 60] * 5),
        "",
        "a..b",
        "a.",
        "*",
        "a.*.b",
        "*a.b",
        "[::1]",
        "k\u00f6ln",
    ],
)
def test_a_name_that_is_no_host_is_refused_before_anything_is_made(name: str, tmp_path: Path) -> None:
    line = error("make", tmp_path / "tls", "--name", "gateway.example", "--name", name)
    assert line.startswith(f"--name is {name!r}, must be an address or a host's name: ")
    assert list(tmp_path.iterdir()) == []


def test_names_of_hosts_and_addresses_are_taken(tmp_path: Path) -> None:
    names = ["gateway", "my_gateway", "*.mobula.example", "xn--kln-sna.example", "x" * 63, "10.0.0.1", "fd00::1"]
    options = [option for name in names for option in ("--name", name)]
    result = CliRunner().invoke(app, ["certs", "make", str(tmp_path / "tls"), *options])
    assert result.exit_code == 0, result.output
    assert set(names[:5]) < CertificateFolder(tmp_path / "tls" / "public").current().names


def test_a_folder_that_cannot_be_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert error("make", tmp_path / "file") == f"cannot write certificates to {tmp_path / 'file'}: Not a directory"
    assert error("make", "/proc/x") == "cannot write certificates to /proc/x: No such file or directory"


def test_a_certificate_that_cannot_be_read_is_named_with_the_reason(tmp_path: Path) -> None:
    folder = make_authority(tmp_path / "tls").folder
    assert error("revoke", folder, "nothere") == "cannot read the certificate nothere: No such file or directory"
    (tmp_path / "words").write_text("no certificate")
    assert error("revoke", folder, tmp_path / "words") == f"{tmp_path / 'words'} holds no certificate in PEM form"
