"""Devices that torch does not know, or does not find on this machine."""

from types import SimpleNamespace

import pytest
import torch

from cluster.config import ConfigError
from cluster.roles.torch_device import check_device


def machine(monkeypatch: pytest.MonkeyPatch, num_devices: int, cuda: str | None) -> None:
    """cuda: the version that torch was built with."""
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(device_count=lambda: num_devices))
    monkeypatch.setattr(torch, "version", SimpleNamespace(cuda=cuda, hip=None))


def test_the_cpu_is_there() -> None:
    check_device("cpu", "key")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "meta", "cpu:0"])
def test_a_device_that_torch_cannot_compute_on_is_told_with_what_there_is(name: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^key is '{name}': torch computes on no such device; set it to cpu, or to "
    ):
        check_device(name, "key")


def test_a_build_of_torch_without_cuda_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 0, None)
    with pytest.raises(ConfigError, match=r"^key is 'cuda': torch .* was built without CUDA; install .*, or set it to"):
        check_device("cuda", "key")


@pytest.mark.parametrize(("name", "num_devices"), [("cuda", 0), ("cuda:2", 2)])
def test_a_device_that_the_machine_does_not_have_is_told_with_how_many_there_are(
    monkeypatch: pytest.MonkeyPatch, name: str, num_devices: int
) -> None:
    machine(monkeypatch, num_devices, "12.8")
    with pytest.raises(ConfigError, match=f"^key is '{name}': torch finds {num_devices} cuda devices on this machine;"):
        check_device(name, "key")


def test_a_device_that_the_machine_has_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 2, "12.8")
    check_device("cuda", "key")
    check_device("cuda:1", "key")
