"""When a process's certificates end, and which keys are used and refused at the gateway."""

from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Gauge

from protos.certificates import CertificateFolder


class Refusal(StrEnum):
    """Why a call was refused for its key."""

    MISSING = "missing"
    UNKNOWN = "unknown"
    EXPIRED = "expired"
    REVOKED = "revoked"
    RIGHT = "right"  # known, but not for this


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


class KeyMetrics:
    """The gateway's. There are as many series as the file has keys."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._calls = Counter("mobula_key_calls", "Calls let through, by the key's id.", ["key_id"], registry=registry)
        self._refusals = Counter(
            "mobula_key_refusals", "Calls refused for their key, by reason.", ["reason"], registry=registry
        )

    def count(self, key_id: str) -> None:
        self._calls.labels(key_id).inc()

    def count_refusal(self, why: Refusal) -> None:
        self._refusals.labels(why.value).inc()
