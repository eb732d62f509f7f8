"""Reads a whole file that somebody else wrote, up to a size."""

from pathlib import Path


class FileTooLarge(ValueError):
    """The message has the limit."""


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """Raises OSError, FileTooLarge."""
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise FileTooLarge(f"{path} has more than {max_bytes} bytes")
    return data
