"""Device names from settings and the command line."""

from __future__ import annotations

import torch


def find_device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is cuda where there is one, otherwise the CPU.

    Raises:
        ValueError: this machine has no such device, or this PyTorch cannot use it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a PyTorch that was built without CUDA
        why = str(error).partition("\n")[0]
        raise ValueError(f"device is {name!r}; it must be 'auto' or a device of this machine ({why})") from error
    return device
