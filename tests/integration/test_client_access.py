"""The command line as a client of gateways that want TLS, certificates and keys."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from prometheus_client import CollectorRegistry
from typer.testing import CliRunner, Result

from cluster.client_access import ClientAccess
from cluster.commands.cli import app
from cluster.security.authority import Authority
from cluster.security.key_guard import KeyCheck
from cluster.security.keys import KeyFile, KeyRing, Right, new_key, write_keys
from cluster.security.metrics import KeyMetrics
from protos.certificates import CertificateFolder
from protos.guard import Guard
from protos.mutual_tls import ServerTls
from tests.certificates import make_authority
from tests.fake_controller import FakeController, admin_server, gateway_host


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    authority = make_authority(tmp_path / "tls")
    authority.issue(authority.folder / "clients" / "ann", "ann", (), days=1)
    return authority


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    key, text = new_key("operator", frozenset(Right))
    write_keys(tmp_path / "keys.json", KeyFile(keys=(key,)))
    (tmp_path / "key.txt").write_text(f"{text}\n")
    return tmp_path / "key.txt"


@pytest.fixture
def address(authority: Authority, key_file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of a gateway that wants all three. The environment is put back after the test."""
    for name in ("MOBULA_TLS", "MOBULA_TLS_CA", "MOBULA_TLS_CERT", "MOBULA_TLS_KEY", "MOBULA_API_KEY_FILE"):
        monkeypatch.setenv(name, "")
    front = ServerTls(CertificateFolder(authority.folder / "public"), is_mutual=True)
    guard = Guard(KeyCheck(KeyRing(key_file.parent / "keys.json"), KeyMetrics(CollectorRegistry())))
    with admin_server(FakeController()) as controller, gateway_host(front, [guard]) as host:
        host.update_admin(controller)
        yield host.address


def status(address: str, **options: Path | None) -> Result:
    given = [text for name, value in options.items() if value for text in (f"--{name.replace('_', '-')}", str(value))]
    return CliRunner().invoke(app, [*given, "status", "--address", address])


def shown(authority: Authority, key_file: Path) -> dict[str, Path | None]:
    ann = authority.folder / "clients" / "ann"
    return {
        "tls_ca": authority.folder / "public" / "ca.crt",
        "cert": ann / "tls.crt",
        "key": ann / "tls.key",
        "api_key_file": key_file,
    }


def test_who_shows_all_that_is_wanted_is_answered(address: str, authority: Authority, key_file: Path) -> None:
    result = status(address, **shown(authority, key_file))
    assert result.exit_code == 0, result.output
    assert "placement" in result.stdout


@pytest.mark.parametrize("missing", ["tls_ca", "certificate", "api_key_file"])
def test_who_lacks_one_of_them_is_not(address: str, authority: Authority, key_file: Path, missing: str) -> None:
    given = shown(authority, key_file)
    for name in ("cert", "key") if missing == "certificate" else (missing,):
        given[name] = None
    result = status(address, **given)
    assert result.exit_code == 1
    if missing == "api_key_file":
        assert "UNAUTHENTICATED: no key" in result.output
        assert "--api-key-file" in result.output
    else:
        assert "UNAVAILABLE" in result.output


@pytest.mark.parametrize("fault", ["expired", "another authority"])
def test_a_clients_certificate_that_is_not_valid_does_not_get_in(
    address: str, authority: Authority, key_file: Path, tmp_path: Path, fault: str
) -> None:
    ann = authority.folder / "clients" / "ann"
    signer = authority if fault == "expired" else Authority.open(tmp_path / "other")
    signer.issue(tmp_path / "ann", "ann", (), days=-1 if fault == "expired" else 1)
    for name in ("tls.crt", "tls.key"):
        (ann / name).write_bytes((tmp_path / "ann" / name).read_bytes())
    result = status(address, **shown(authority, key_file))
    assert result.exit_code == 1
    assert "UNAVAILABLE" in result.output


def test_a_gateway_of_another_authority_is_not_talked_to(address: str, key_file: Path, tmp_path: Path) -> None:
    other = make_authority(tmp_path / "other")
    result = status(address, tls_ca=other.folder / "public" / "ca.crt", api_key_file=key_file)
    assert result.exit_code == 1
    assert "is not to be believed: " in result.output
    assert "give --tls-ca the ca.crt of its tls.clients folder" in result.output


def test_a_revoked_client_is_refused(address: str, authority: Authority, key_file: Path) -> None:
    authority.revoke(x509.load_pem_x509_certificate((authority.folder / "clients" / "ann" / "tls.crt").read_bytes()))
    result = status(address, **shown(authority, key_file))
    assert result.exit_code == 1
    assert "UNAUTHENTICATED: the certificate is revoked" in result.output


def test_a_certificate_without_its_key_is_an_error_that_says_so(authority: Authority, address: str) -> None:
    result = status(address, cert=authority.folder / "clients" / "ann" / "tls.crt")
    assert result.exit_code == 1
    assert "MOBULA_TLS_KEY" in result.output


def test_a_file_that_is_not_there_is_named(address: str, tmp_path: Path) -> None:
    result = status(address, tls_ca=tmp_path / "nothing.crt")
    assert result.exit_code == 1
    assert "nothing.crt" in result.output


def test_a_file_that_holds_no_certificate_is_named(address: str, tmp_path: Path) -> None:
    (tmp_path / "hostname").write_text("gateway")
    result = status(address, tls_ca=tmp_path / "hostname")
    assert result.exit_code == 1
    assert "hostname holds no certificate in PEM form" in result.output


def test_secrets_are_not_printed() -> None:
    access = ClientAccess(api_key="user.SECRET", private_key=b"PRIVATE")
    assert "SECRET" not in repr(access)
    assert "PRIVATE" not in repr(access)


def test_certificates_are_made_and_revoked_by_command(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    made = CliRunner().invoke(app, ["certs", "make", str(folder), "--name", "gateway.example", "--client", "bob"])
    assert made.exit_code == 0, made.output
    assert "gateway.example" in CertificateFolder(folder / "public").current().names
    modes = {path.relative_to(folder): path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}
    assert modes.pop(Path("ca.crt")) == 0o644  # what other users of the machine need, and no key lies beside it
    assert set(modes.values()) == {0o600}
    assert {(folder / path).parent.stat().st_mode & 0o777 for path in modes} == {0o700}
    assert (folder / "ca.crt").read_bytes() == (folder / "public" / "ca.crt").read_bytes()
    bob = folder / "clients" / "bob" / "tls.crt"
    assert CliRunner().invoke(app, ["certs", "revoke", str(folder), str(bob)]).exit_code == 0
    assert CertificateFolder(folder / "public").current().has_revoked(bob.read_bytes())
