"""When a process's certificates end."""

from prometheus_client import CollectorRegistry, Gauge

from protos.certificates import CertificateFolder


class CertificateMetrics:
    """One process's. Series are made when a certificate is watched: without TLS there are none."""

    def __init__(self, registry: CollectorRegistry, process: str) -> None:
        """process: as the controller names it, "shard-0"."""
        self._process = process
        self._expiry = Gauge(
            "mobula_certificate_expiry_timestamp_seconds",
            "When the certificate that is shown ends, in seconds since 1970.",
            ["process", "role"],
            registry=registry,
        )

    def watch(self, role: str, folder: CertificateFolder) -> None:
        """Shows the end of the folder's newest certificate. role: whose it is, or "public"."""
        self._expiry.labels(self._process, role).set_function(lambda: folder.current().expires_at_s)
