"""What the configuration's `tls` means for one process: its folder of certificates and what it makes of them."""

from pathlib import Path

from cluster.config import TlsConfig
from protos.certificates import CertificateFolder
from protos.credentials import PLAINTEXT, Credentials, PeerRole, ServerCredentials
from protos.mutual_tls import MutualTls, ServerTls, role_name


def process_folder(tls: TlsConfig, role: PeerRole) -> CertificateFolder | None:
    """The role's certificates; None when processes talk plaintext. Raises CertificateError."""
    return CertificateFolder(Path(tls.processes) / role.value, role_name(role)) if tls.processes else None


def process_credentials(folder: CertificateFolder | None) -> Credentials:
    """Between processes."""
    return MutualTls(folder) if folder else PLAINTEXT


def client_folder(tls: TlsConfig) -> CertificateFolder | None:
    """What clients are shown; None when they talk plaintext. Raises CertificateError."""
    return CertificateFolder(Path(tls.clients)) if tls.clients else None


def client_credentials(tls: TlsConfig, folder: CertificateFolder | None) -> ServerCredentials:
    """On the gateway's port."""
    return ServerTls(folder, is_mutual=tls.require_client_certificate) if folder else PLAINTEXT
