"""The device that a network runs on."""

import torch

from gigatome.core.errors import ConfigError


def usable_device(name: str) -> torch.device:
    """The device ``name``, such as ``"cpu"`` or ``"cuda:1"``, after putting something on it.

    Raises:
        ConfigError: there is no such device here, or it does not work.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name} cannot be used ({str(error).splitlines()[0]}); try device cpu") from error
    return device
