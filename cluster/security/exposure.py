"""What a configuration protects and what it leaves open: files are checked before anything is started, and who opens a
port to others without protection is told.
"""

import ipaddress
from pathlib import Path

from cluster.config import ConfigError, MobulaConfig
from cluster.security.keys import KeyFileError, KeyRing
from cluster.security.process_tls import client_folder, process_folder
from protos.certificates import CertificateError
from protos.credentials import PeerRole


def check_files(config: MobulaConfig) -> None:
    """For a system on this machine. Raises ConfigError with the key of the configuration at fault."""
    try:
        for role in PeerRole:
            process_folder(config.tls, role)
    except CertificateError as error:
        raise ConfigError(f"tls.processes: {error}; `mobula certs make` makes such folders") from error
    try:
        client_folder(config.tls)
    except CertificateError as error:
        raise ConfigError(f"tls.clients: {error}; `mobula certs make` makes such a folder") from error
    try:
        if config.gateway.keys:
            KeyRing(Path(config.gateway.keys))
    except KeyFileError as error:
        raise ConfigError(f"gateway.keys: {error}; `mobula keys add` makes such a file") from error


def exposures(config: MobulaConfig) -> list[str]:
    """What others can do for want of protection, a sentence each."""
    found = []
    if not _is_loopback(config.gateway.host):
        if not config.gateway.keys and not config.tls.require_client_certificate:
            found.append(f"whoever reaches {config.gateway.host} may generate and rebalance; set gateway.keys")
        if config.gateway.keys and not config.gateway.http_key:
            found.append("whoever reaches the gateway's HTTP port may see the dashboard; set gateway.http_key")
        if not config.tls.clients:
            found.append("clients' requests, and keys, can be read on their way; set tls.clients")
    if config.ray.address is not None and not config.tls.processes:
        found.append("processes trust whoever reaches their ports; set tls.processes, or keep the network closed")
    return found


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
