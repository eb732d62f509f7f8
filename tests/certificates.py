"""Certificates of an authority in a temporary folder, for tests."""

from pathlib import Path

import grpc

from cluster.security.authority import PUBLIC_FOLDER, Authority
from protos.certificates import CertificateFolder
from protos.credentials import PeerRole
from protos.mutual_tls import MutualTls, role_name

HOST = "127.0.0.1"


def make_authority(folder: Path) -> Authority:
    """With certificates for every role and for the gateway's port."""
    authority = Authority.open(folder)
    authority.issue_roles(days=1)
    authority.issue(folder / PUBLIC_FOLDER, "gateway", ["localhost", HOST], days=1)
    return authority


def role_folder(authority: Authority, role: PeerRole) -> CertificateFolder:
    return CertificateFolder(authority.folder / role.value, role_name(role))


def credentials(authority: Authority, role: PeerRole) -> MutualTls:
    return MutualTls(role_folder(authority, role))


def client_credentials(authority: Authority, shown: Path | None = None) -> grpc.ChannelCredentials:
    """A client's that believes the authority; shown: the folder of its own certificate, if it has one."""
    believed = (authority.folder / PUBLIC_FOLDER / "ca.crt").read_bytes()
    if shown is None:
        return grpc.ssl_channel_credentials(believed)
    return grpc.ssl_channel_credentials(believed, (shown / "tls.key").read_bytes(), (shown / "tls.crt").read_bytes())
