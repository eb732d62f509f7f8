"""A certificate on disk with its key and its authority, as cert-manager mounts them, read again when they change.

A folder holds `tls.crt` (the certificate and what it was signed with), `tls.key`, `ca.crt` (the authorities to believe)
and, if there is one, `ca.crl` (what those authorities have revoked). Files that cannot be used, such as half of a
renewal, are not taken: what was read before stays, and the log says why. Knows nothing of gRPC.
"""

import logging
import ssl
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509

from protos.bounded_file import FileTooLarge, read_bounded

logger = logging.getLogger(__name__)

CHAIN, KEY, AUTHORITY, REVOKED = "tls.crt", "tls.key", "ca.crt", "ca.crl"
MAX_FILE_BYTES = 1024 * 1024  # of each; a bundle of public authorities has a quarter of it


class CertificateError(Exception):
    """Certificates cannot be used; the message names the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """One state of a folder.

    Attributes:
        version: differs between two states.
        chain, key, authority: PEM. The key is kept out of what is printed.
        names: DNS names of the certificate.
        expires_at_s: seconds since 1970.
        revoked: issuer (its distinguished name) and serial number of certificates that are not to be believed.
    """

    version: int
    chain: bytes
    key: bytes = field(repr=False)
    authority: bytes
    names: frozenset[str]
    expires_at_s: float
    revoked: frozenset[tuple[str, int]]

    def has_revoked(self, pem: bytes) -> bool:
        """Whether the certificate in `pem` is revoked by its authority."""
        if not self.revoked:
            return False
        certificate = x509.load_pem_x509_certificate(pem)
        return (certificate.issuer.rfc4514_string(), certificate.serial_number) in self.revoked


class CertificateFolder:
    """The newest state of a folder that can be used. Any thread may ask."""

    def __init__(self, path: Path, required_name: str | None = None) -> None:
        """required_name: a DNS name that the certificate must carry. Raises CertificateError."""
        self.path = path
        self._required_name = required_name
        self._lock = threading.Lock()
        self._signature = self._stat()
        self._certificate = self._read(version=1)

    def current(self) -> Certificate:
        """Looks at the files' times; reads them only when those changed."""
        with self._lock:
            signature = self._stat()
            if signature != self._signature:
                self._signature = signature
                try:
                    self._certificate = self._read(self._certificate.version + 1)
                except CertificateError as error:
                    logger.error("kept the certificates that were read before: %s", error)  # noqa: TRY400
                else:
                    logger.info("read the certificates in %s anew", self.path)
            return self._certificate

    def _stat(self) -> Mapping[str, tuple[int, int, int]]:
        found = {}
        for name in (CHAIN, KEY, AUTHORITY, REVOKED):
            try:
                status = (self.path / name).stat()
            except OSError:
                continue  # what must be there is missed when it is read
            found[name] = (status.st_mtime_ns, status.st_size, status.st_ino)
        return found

    def _read(self, version: int) -> Certificate:
        chain, key, authority = (self._bytes(name) for name in (CHAIN, KEY, AUTHORITY))
        self._check_pair()
        try:
            certificate = x509.load_pem_x509_certificates(chain)[0]
            authorities = x509.load_pem_x509_certificates(authority)
            names = dns_names(certificate)
        except ValueError as error:
            raise CertificateError(f"{self.path}: {CHAIN} or {AUTHORITY} is not a PEM certificate: {error}") from error
        if self._required_name is not None and self._required_name not in names:
            raise CertificateError(
                f"{self.path / CHAIN} carries the DNS names {sorted(names)}, it needs {self._required_name}: it is the "
                "certificate of another role"
            )
        return Certificate(
            version=version,
            chain=chain,
            key=key,
            authority=authority,
            names=names,
            expires_at_s=certificate.not_valid_after_utc.timestamp(),
            revoked=self._revoked(authorities),
        )

    def _bytes(self, name: str) -> bytes:
        path = self.path / name
        try:
            return read_bounded(path, MAX_FILE_BYTES)
        except OSError as error:
            raise CertificateError(f"cannot read {path}: {error.strerror}") from error
        except FileTooLarge as error:
            raise CertificateError(str(error)) from error

    def _check_pair(self) -> None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.path / CHAIN, self.path / KEY)
        except (ssl.SSLError, OSError) as error:
            raise CertificateError(f"{self.path}: {CHAIN} and {KEY} are not a pair: {error}") from error

    def _revoked(self, authorities: list[x509.Certificate]) -> frozenset[tuple[str, int]]:
        """Of the list in REVOKED, which one of the authorities must have signed."""
        if not (self.path / REVOKED).exists():
            return frozenset()
        try:
            revoked = x509.load_pem_x509_crl(self._bytes(REVOKED))
            signers = [authority for authority in authorities if authority.subject == revoked.issuer]
            is_genuine = any(revoked.is_signature_valid(signer.public_key()) for signer in signers)  # type: ignore[arg-type]
        except (ValueError, TypeError) as error:
            raise CertificateError(f"{self.path / REVOKED} is not a revocation list: {error}") from error
        if not is_genuine:
            raise CertificateError(f"{self.path / REVOKED} is not signed by an authority in {AUTHORITY}")
        return frozenset((revoked.issuer.rfc4514_string(), entry.serial_number) for entry in revoked)


def dns_names(certificate: x509.Certificate) -> frozenset[str]:
    """That a certificate carries."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return frozenset()
    return frozenset(names.get_values_for_type(x509.DNSName))
