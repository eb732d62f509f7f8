import ctypes
import importlib.machinery
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from protos import native_library

FILE_NAME = f"library{importlib.machinery.EXTENSION_SUFFIXES[0]}"


def test_a_library_that_cannot_be_loaded_counts_as_none_and_the_loaders_reason_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FILE_NAME).write_text("no library")
    with caplog.at_level(logging.WARNING):
        assert native_library.load(tmp_path, "abi", 1) is None
    (line,) = caplog.messages
    reason = native_library.why_not(tmp_path, "abi", 1)
    assert reason is not None
    assert line == f"the library in {tmp_path} is {reason}"
    assert reason.startswith(f"there but cannot be loaded ({tmp_path / FILE_NAME}: ")
    assert reason.endswith("; install again")


def test_a_library_of_other_sources_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FILE_NAME).touch()
    library = SimpleNamespace(abi=lambda: 1)
    monkeypatch.setattr(ctypes, "CDLL", lambda path: library)
    assert native_library.load(tmp_path, "abi", 1) is library
    assert native_library.why_not(tmp_path, "abi", 1) is None
    assert caplog.messages == []
    for function, abi in (("abi", 2), ("other", 1)):
        assert native_library.load(tmp_path, function, abi) is None
        assert native_library.why_not(tmp_path, function, abi) == "built from other sources; install again"
    assert len(caplog.messages) == 2


def test_a_library_that_was_not_built_is_no_reason_to_warn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert native_library.load(tmp_path, "abi", 1) is None
    assert native_library.why_not(tmp_path, "abi", 1) == native_library.NOT_BUILT
    assert caplog.messages == []
