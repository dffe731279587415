"""Device names from settings and the command line, and what devices are called and can do at best."""

from __future__ import annotations

import os
import platform

import torch

GIB = 2**30  # bytes

# Dense bfloat16 TFLOP/s of data sheets, which published utilisations refer to; the first name that a device's has.
DATA_SHEETS = {
    "H100 PCIe": 756.5,
    "H100 NVL": 835.5,
    "H100": 989.5,
    "H200": 989.5,
    "H800": 989.5,
    "A100": 312.0,
    "A800": 312.0,
    "B200": 2250.0,
}


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


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    return (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPUs {platform.machine()}"
    )


def data_sheet_tflops(device: torch.device) -> float | None:
    """The data sheet's dense bfloat16 rate of a GPU; None of a device that is not known."""
    name = device_name(device) if device.type == "cuda" else ""
    return next((rate for known, rate in DATA_SHEETS.items() if known in name), None)
