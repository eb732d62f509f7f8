"""Folders of certificates: what is refused, what is noticed, what is kept."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from threading import Thread

import pytest
from cryptography import x509

from cluster.security.authority import Authority
from protos.certificates import MAX_FILE_BYTES, CertificateError, CertificateFolder


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    authority = Authority.open(tmp_path / "tls")
    authority.issue(tmp_path / "shard", "shard", ["shard.mobula.internal"], days=2)
    return authority


def test_a_renewed_certificate_is_noticed(authority: Authority, tmp_path: Path) -> None:
    folder = CertificateFolder(tmp_path / "shard")
    before = folder.current()
    assert folder.current() is before
    authority.issue(tmp_path / "shard", "shard", ["shard.mobula.internal"], days=30)
    after = folder.current()
    assert after.version > before.version
    assert after.expires_at_s - before.expires_at_s == pytest.approx(28 * 86400, abs=60)


def test_a_renewal_is_read_once_however_many_threads_notice_it(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = CertificateFolder(tmp_path / "shard")
    before = folder.current().version
    look = folder._stat
    others: list[Thread] = []

    def look_just_before_a_renewal() -> Mapping[str, tuple[int, int, int]]:
        signature = look()
        if not others:
            authority.issue(tmp_path / "shard", "shard", ["shard.mobula.internal"], days=30)
            others.append(Thread(target=folder.current))
            others[0].start()
            others[0].join(timeout=0.1)  # as far as it gets meanwhile
        return signature

    monkeypatch.setattr(folder, "_stat", look_just_before_a_renewal)
    folder.current()
    others[0].join()
    assert folder.current().version == before + 1


@pytest.mark.parametrize("damage", ["half a renewal", "no key", "garbage", "huge", "another authority's list"])
def test_files_that_cannot_be_used_are_not_taken_and_named_in_the_log(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    home = tmp_path / "shard"
    folder = CertificateFolder(home)
    before = folder.current()
    secret = (home / "tls.key").read_text().splitlines()[1]
    if damage == "half a renewal":
        authority.issue(tmp_path / "new", "shard", [], days=1)
        shutil.copy(tmp_path / "new" / "tls.crt", home / "tls.crt")
    elif damage == "no key":
        (home / "tls.key").unlink()
    elif damage == "garbage":
        (home / "ca.crt").write_text("no certificate")
    elif damage == "huge":
        (home / "tls.crt").write_bytes(b"x" * (MAX_FILE_BYTES + 1))
    else:
        other = Authority.open(tmp_path / "other")
        shutil.copy(other.folder / "authority" / "ca.crl", home / "ca.crl")
    assert folder.current() is before
    assert "kept the certificates" in caplog.text
    assert str(home) in caplog.text
    assert secret not in caplog.text
    authority.issue(home, "shard", [], days=1)
    assert folder.current().version > before.version


def test_a_certificate_of_another_role_is_refused_at_start(authority: Authority, tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match=r"shard\.mobula\.internal.*needs worker\.mobula\.internal"):
        CertificateFolder(tmp_path / "shard", "worker.mobula.internal")


def test_a_key_is_not_part_of_what_is_printed(authority: Authority, tmp_path: Path) -> None:
    certificate = CertificateFolder(tmp_path / "shard").current()
    assert "PRIVATE" not in repr(certificate)
    assert (tmp_path / "shard" / "tls.key").stat().st_mode & 0o077 == 0


def test_a_revoked_certificate_is_known_in_every_folder(authority: Authority) -> None:
    authority.issue_roles(days=1)
    folder = CertificateFolder(authority.folder / "shard")
    worker = (authority.folder / "worker" / "tls.crt").read_bytes()
    assert not folder.current().has_revoked(worker)
    authority.revoke(x509.load_pem_x509_certificate(worker))
    assert folder.current().has_revoked(worker)
    assert not folder.current().has_revoked((authority.folder / "gateway" / "tls.crt").read_bytes())


def test_only_an_authoritys_own_certificates_can_be_revoked(authority: Authority, tmp_path: Path) -> None:
    other = Authority.open(tmp_path / "other")
    with pytest.raises(CertificateError, match="is not of the authority"):
        authority.revoke(other.certificate)


def test_an_authority_is_kept_when_it_is_opened_again(authority: Authority) -> None:
    assert Authority.open(authority.folder).certificate == authority.certificate
