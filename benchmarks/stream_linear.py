"""``stream_linear``: both streams' matrix products into one buffer.

Peers: the published way (each stream is gathered, multiplied, and scattered into a zeroed buffer), eager and compiled;
one grouped matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from unigendet.ops import stream_linear

from .candidate import Function, raise_if_not_cuda
from .contest import Case, Work
from .judge import whole
from .stream_case import candidates, random, streams

OP = "stream_linear"


def case(device: torch.device, dtype: torch.dtype, rows: int, columns: int, out: int) -> Case:
    """x [rows, columns] and a weight [out, columns] per stream."""
    layout, n = streams(rows)
    und, gen = torch.arange(n, device=device), torch.arange(n, rows, device=device)
    ends = torch.tensor([n, rows], dtype=torch.int32, device=device)

    def inputs(seed: int) -> tuple[Tensor, Tensor]:
        make = random(device, dtype, seed)
        return make(rows, columns).requires_grad_(), (make(2, out, columns) * columns**-0.5).requires_grad_()

    def own(x: Tensor, weights: Tensor, backend: str) -> Tensor:
        return stream_linear(x, (weights[0], weights[1]), layout, backend=backend)

    def eager(x: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros(rows, out, device=x.device, dtype=x.dtype)
        y[und] = F.linear(x[und], weights[0])
        y[gen] = F.linear(x[gen], weights[1])
        return y

    def grouped() -> Function:
        raise_if_not_cuda(device)
        return lambda x, weights: torch.nn.functional.grouped_mm(x, weights.transpose(1, 2), offs=ends)

    flops, size = 2 * rows * columns * out, dtype.itemsize * (rows * (columns + out) + 2 * columns * out)
    return Case(
        OP,
        f"{rows} x {columns} to {out}",
        dtype,
        inputs,
        work={"forward": Work(flops, size), "backward": Work(2 * flops, 2 * size)},
        truth=whole(partial(own, backend="reference")),
        **candidates(OP, device, dtype, eager, own, {"grouped_mm": grouped}, backends=("torch",)),  # cuBLAS on GPUs
    )


def cases(device: torch.device, size: str) -> Iterator[Case]:
    """BAGEL-7B's width in bfloat16 on GPUs, a small model's in float32 on CPUs."""
    if size == "tiny":
        yield case(device, torch.float32, 24, 16, 16)
    elif device.type == "cuda":
        yield case(device, torch.bfloat16, 16384, 3584, 3584)
    else:
        yield case(device, torch.float32, 4096, 512, 512)
