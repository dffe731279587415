"""What the ops' ``cpp`` and ``cuda`` backends share: tensors and numbers of threads as ``unigendet._C`` wants them."""

from __future__ import annotations

import torch
from torch import Tensor

from unigendet.ops._launching import unit_stride

_MAX_THREADS = 4096  # as csrc/tensors.cpp


def threads() -> int:
    """How many threads the CPU's kernels may use: as many as PyTorch."""
    return min(torch.get_num_threads(), _MAX_THREADS)


def plain(x: Tensor) -> Tensor:
    """x with contiguous rows, at an address that its items may have; torch.frombuffer makes others."""
    x = unit_stride(x)
    return x if x.data_ptr() % x.element_size() == 0 else x.clone()
