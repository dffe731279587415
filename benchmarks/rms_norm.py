"""``rms_norm``: residual add and norm with a weight per stream.

Peers: the published way (each stream is gathered, normed, and scattered into a zeroed buffer), eager and compiled;
Liger-Kernel and quack with one weight for both streams, which is less work.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from unigendet.ops import rms_norm

from .candidate import Function
from .contest import Case, Work
from .judge import whole
from .stream_case import candidates, library, random, streams

OP = "rms_norm"
EPS = 1e-6


def case(device: torch.device, dtype: torch.dtype, rows: int, columns: int) -> Case:
    """Rows of both streams with a residual; everything wants a gradient."""
    layout, n = streams(rows)
    und, gen = torch.arange(n, device=device), torch.arange(n, rows, device=device)

    def inputs(seed: int) -> tuple[Tensor, ...]:
        make = random(device, dtype, seed)
        return tuple(
            x.requires_grad_() for x in (make(rows, columns), make(rows, columns), make(columns), make(columns))
        )

    def own(x: Tensor, residual: Tensor, weight_und: Tensor, weight_gen: Tensor, backend: str) -> tuple[Tensor, ...]:
        return rms_norm(x, (weight_und, weight_gen), layout, residual=residual, eps=EPS, backend=backend)

    def eager(x: Tensor, residual: Tensor, weight_und: Tensor, weight_gen: Tensor) -> tuple[Tensor, Tensor]:
        summed = x + residual
        wide = summed.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        h = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)
        normed = torch.zeros_like(h)
        normed[und] = weight_und * h[und]
        normed[gen] = weight_gen * h[gen]
        return normed, summed

    size = dtype.itemsize * rows * columns
    more = {"liger (1 weight)": partial(_liger, device), "quack (1 weight)": partial(_quack, device)}
    return Case(
        OP,
        f"{rows} x {columns}",
        dtype,
        inputs,
        # Forward x, residual, normed, sum; backward their gradients and the sum.
        work={"forward": Work(bytes=4 * size), "backward": Work(bytes=4 * size)},
        truth=whole(partial(own, backend="reference")),
        **candidates(OP, device, dtype, eager, own, more),
    )


def _liger(device: torch.device) -> Function:
    function = library("liger-kernel", "liger_kernel.ops.fused_add_rms_norm", "LigerFusedAddRMSNormFunction", device)
    return lambda x, residual, weight, _: function.apply(x, residual, weight, EPS, 0.0, "llama", False)


def _quack(device: torch.device) -> Function:
    function = library("quack", "quack", "rmsnorm", device)
    return lambda x, residual, weight, _: function(x, weight, residual=residual, eps=EPS, prenorm=True)


def cases(device: torch.device, size: str) -> Iterator[Case]:
    """BAGEL-7B's width in bfloat16 on GPUs, a small model's in float32 on CPUs."""
    if size == "tiny":
        yield case(device, torch.float32, 24, 16)
    elif device.type == "cuda":
        yield case(device, torch.bfloat16, 16384, 3584)
    else:
        yield case(device, torch.float32, 4096, 512)
