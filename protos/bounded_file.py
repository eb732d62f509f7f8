"""Reads a whole file that somebody else wrote, up to a size."""

from pathlib import Path


class FileTooLarge(ValueError):
    """The message has the path and the limit; `reason` the limit alone."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.reason = f"it has more than {max_bytes} bytes"
        super().__init__(f"{path} has more than {max_bytes} bytes")


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """Raises OSError, FileTooLarge."""
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise FileTooLarge(path, max_bytes)
    return data


def why_unreadable(error: Exception) -> str:
    """What reading a file or understanding it has raised, for a sentence that names the file itself."""
    if isinstance(error, FileTooLarge):
        return error.reason
    return (isinstance(error, OSError) and error.strerror) or str(error)
