"""Whether torch can compute on a device of this machine: asked before processes are started on it."""

import torch

from cluster.config import ConfigError


def check_device(name: str, key: str) -> None:
    """key: of the configuration, for the error. Raises ConfigError with the way out."""
    unknown = ConfigError(f"{key} is {name!r}: torch computes on no such device; set it to cpu, or to cuda or cuda:N")
    try:
        device = torch.device(name)
        num_devices = int(getattr(torch, device.type).device_count())
    except (RuntimeError, AttributeError) as error:  # no device of torch's, or none that is computed on from here
        raise unknown from error
    if device.type == "cpu" and name != "cpu":  # with a number: there is one, and its name is compared elsewhere
        raise unknown
    if device.type == "cuda" and not torch.version.cuda and not torch.version.hip:
        raise ConfigError(
            f"{key} is {name!r}: torch {torch.__version__} was built without CUDA; install a build with it, or set it "
            "to cpu"
        )
    if num_devices <= (device.index or 0):
        raise ConfigError(
            f"{key} is {name!r}: torch finds {num_devices} {device.type} devices on this machine; see that its driver "
            "runs and that the process may use it, or set it to cpu"
        )
