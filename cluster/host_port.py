"""Addresses as people write them."""


def host_and_port(address: str) -> tuple[str, int] | None:
    """Of host:port; None for what is none."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not port.isdecimal() or not 0 < int(port) < 2**16 or "/" in host:
        return None
    try:
        host.encode("idna")
    except UnicodeError:  # an empty label, or one that is too long
        return None
    return (host, int(port)) if host else None
