"""A certificate authority in a folder, for tests and for deployments without one; on Kubernetes cert-manager is it.

Layout: `authority/` (its key: keep it away from the machines that serve), `ROLE/` for each kind of process, `metrics/`
for who reads their series, `public/` for the gateway's port, `clients/NAME/`. Each of them holds what
protos/certificates.py reads, and `ca.crl`, for its owner only. Beside them lies `ca.crt`, all that most clients need,
for everybody. Files are replaced as a whole.
"""

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cluster.security.http_tls import READER_NAME
from cluster.security.private_file import PUBLIC, replace_file
from protos.certificates import AUTHORITY, CHAIN, KEY, REVOKED, CertificateError
from protos.credentials import PeerRole
from protos.mutual_tls import role_name

AUTHORITY_FOLDER, PUBLIC_FOLDER, CLIENTS_FOLDER, READER_FOLDER = "authority", "public", "clients", "metrics"
AUTHORITY_KEY = "ca.key"
AUTHORITY_DAYS = 3650
CLOCK_SKEW = datetime.timedelta(minutes=5)  # a certificate is valid at once on machines whose clock is behind


class Authority:
    """Signs, renews and revokes. `folder` is the whole layout's."""

    def __init__(self, folder: Path, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self.folder = folder
        self.certificate = certificate
        self._key = key

    @classmethod
    def open(cls, folder: Path) -> "Authority":
        """The one in the folder; makes it if there is none. Raises CertificateError when it cannot be read."""
        home = folder / AUTHORITY_FOLDER
        if not (home / AUTHORITY).exists():
            return cls._make(folder)
        try:
            certificate = x509.load_pem_x509_certificate((home / AUTHORITY).read_bytes())
            key = serialization.load_pem_private_key((home / AUTHORITY_KEY).read_bytes(), password=None)
        except (OSError, ValueError, TypeError) as error:
            raise CertificateError(f"cannot read the authority in {home}: {error}") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise CertificateError(f"{home / AUTHORITY_KEY} is not the key of {home / AUTHORITY}")
        return cls(folder, certificate, key)

    @classmethod
    def _make(cls, folder: Path) -> "Authority":
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name(f"Mobula authority {x509.random_serial_number():x}"[:64])
        certificate = (
            _builder(name, name, key, AUTHORITY_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(key, hashes.SHA256())
        )
        authority = cls(folder, certificate, key)
        home = folder / AUTHORITY_FOLDER
        replace_file(home / AUTHORITY_KEY, _key_pem(key))
        authority._write_revoked(home, authority._revocation_list([]))
        replace_file(home / AUTHORITY, _pem(certificate))
        return authority

    def issue(self, folder: Path, common_name: str, names: Sequence[str], days: float) -> None:
        """Writes a new certificate for the names (DNS names and addresses) into `folder`, over what is there."""
        key = ec.generate_private_key(ec.SECP256R1())
        usage = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = (
            _builder(_name(common_name), self.certificate.subject, key, days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usage), critical=False)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName([_general(name) for name in names]), False)
        replace_file(folder / KEY, _key_pem(key))
        replace_file(folder / CHAIN, _pem(builder.sign(self._key, hashes.SHA256())))
        replace_file(folder / AUTHORITY, _pem(self.certificate))
        self._write_revoked(folder, self._revoked())

    def issue_roles(self, days: float) -> None:
        """New certificates for every kind of process, and for a Prometheus that reads the series of each.

        Beside their folders the authority's own, for clients.
        """
        replace_file(self.folder / AUTHORITY, _pem(self.certificate), PUBLIC)
        for role in PeerRole:
            self.issue(self.folder / role.value, role.value, [role_name(role)], days)
        self.issue(self.folder / READER_FOLDER, READER_FOLDER, [READER_NAME], days)

    def revoke(self, certificate: x509.Certificate) -> None:
        """Adds it to the list in every folder. Raises CertificateError when it is not of this authority."""
        try:
            certificate.verify_directly_issued_by(self.certificate)
        except (ValueError, TypeError, InvalidSignature) as error:
            raise CertificateError(f"the certificate is not of the authority in {self.folder}") from error
        entry = (
            x509.RevokedCertificateBuilder()
            .serial_number(certificate.serial_number)
            .revocation_date(datetime.datetime.now(datetime.UTC))
            .build()
        )
        revoked = self._revocation_list([*self._revoked(), entry])
        for found in self.folder.rglob(REVOKED):
            self._write_revoked(found.parent, revoked)

    def _revoked(self) -> x509.CertificateRevocationList:
        return x509.load_pem_x509_crl((self.folder / AUTHORITY_FOLDER / REVOKED).read_bytes())

    def _revocation_list(self, entries: Sequence[x509.RevokedCertificate]) -> x509.CertificateRevocationList:
        now = datetime.datetime.now(datetime.UTC)
        builder = x509.CertificateRevocationListBuilder().issuer_name(self.certificate.subject)
        builder = builder.last_update(now).next_update(now + datetime.timedelta(days=AUTHORITY_DAYS))
        for entry in entries:
            builder = builder.add_revoked_certificate(entry)
        return builder.sign(self._key, hashes.SHA256())

    def _write_revoked(self, folder: Path, revoked: x509.CertificateRevocationList) -> None:
        replace_file(folder / REVOKED, revoked.public_bytes(serialization.Encoding.PEM))


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: float
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    end = now + datetime.timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, end) - CLOCK_SKEW)
        .not_valid_after(end)
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
