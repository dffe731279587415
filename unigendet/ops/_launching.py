"""What the ops' ``triton`` backends share: running launches, and tensors as kernels want them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import numpy as np
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


def empty_contiguous(x: Tensor) -> Tensor:
    """Uninitialised memory like x, contiguous whatever x's strides."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def table_stream(op: str, backend: str, device: torch.device) -> int:
    """The stream to which a table belongs that goes to ``device`` now: another one would not wait for the copy.

    Raises ValueError while a CUDA graph is captured: it would keep addresses of tables that caches let go.
    """
    if device.type != "cuda":
        return 0
    if torch.cuda.is_current_stream_capturing():
        raise ValueError(f"{op} cannot be part of a CUDA graph with backend={backend!r}; run it outside")
    return torch.cuda.current_stream(device).cuda_stream


def table_on_device(table: np.ndarray, device: torch.device) -> Tensor:
    """``table`` as int32 on ``device``, in a copy that the host does not wait for."""
    host = torch.from_numpy(table.astype(np.int32))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
