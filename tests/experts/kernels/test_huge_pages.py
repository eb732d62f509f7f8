"""Huge pages are advice: the numbers stay, and so does the administrator's word."""

from pathlib import Path

import pytest
import torch

from experts.kernels import huge_pages


def huge_bytes() -> int:
    """Of this process's memory."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))


@pytest.mark.parametrize(
    ("setting", "are_allowed"), [("always [madvise] never", True), ("always madvise [never]", False)]
)
def test_the_machine_s_setting_is_followed(tmp_path: Path, setting: str, are_allowed: bool) -> None:
    path = tmp_path / "enabled"
    path.write_text(setting + "\n", encoding="utf-8")
    assert huge_pages.are_allowed(path) is are_allowed


def test_a_machine_without_the_setting_has_none(tmp_path: Path) -> None:
    assert not huge_pages.are_allowed(tmp_path / "enabled")


@pytest.mark.skipif(not huge_pages.are_allowed(), reason="this machine has no huge pages for who asks")
def test_memory_that_was_asked_for_becomes_huge_and_keeps_its_numbers() -> None:
    before = huge_bytes()
    memory = torch.empty(16 * huge_pages.PAGE_BYTES, dtype=torch.uint8)
    huge_pages.ask_for(memory)
    memory.copy_(torch.arange(len(memory)) % 251)
    huge_pages.gather(memory)
    assert huge_bytes() > before  # how many, the machine's free memory decides
    assert torch.equal(memory, (torch.arange(len(memory)) % 251).to(torch.uint8))


def test_small_memory_and_its_neighbours_are_left_alone() -> None:
    memory = torch.arange(100)
    huge_pages.ask_for(memory)
    huge_pages.gather(memory)
    assert memory.tolist() == list(range(100))
