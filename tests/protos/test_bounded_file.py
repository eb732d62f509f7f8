"""Files that cannot be read, in sentences that name them once."""

from pathlib import Path

import pytest

from protos.bounded_file import FileTooLarge, read_bounded, why_unreadable


def test_the_reason_does_not_name_the_file_again(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file") as missing:
        read_bounded(tmp_path / "missing", 10)
    assert why_unreadable(missing.value) == "No such file or directory"
    (tmp_path / "large").write_bytes(bytes(11))
    with pytest.raises(FileTooLarge, match="large has more than 10 bytes") as large:
        read_bounded(tmp_path / "large", 10)
    assert why_unreadable(large.value) == "it has more than 10 bytes"
    assert why_unreadable(ValueError("no text")) == "no text"
