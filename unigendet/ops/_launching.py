"""What the ops' ``triton`` backends share: running launches, and tensors as kernels want them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor


def capability(x: Tensor) -> tuple[int, int] | None:
    """Compute capability of x's device; None on the CPU, where Triton interprets."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else None


def run_launches(launches: Iterable[Any], x: Tensor) -> None:
    """Run the launches on the device of ``x``: Triton launches on the current one, which may be another."""
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        for launch in launches:
            launch.run()


def unit_stride(x: Tensor) -> Tensor:
    """x, or a copy if its last dimension is strided: kernels read rows of contiguous numbers."""
    return x if x.stride(-1) == 1 else x.contiguous()
