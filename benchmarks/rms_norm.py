"""``rms_norm``: residual add and norm with a weight per stream.

Peers: PyTorch's own norm on the two slices, eager and compiled; the published way (each stream is gathered, normed, and
scattered into a zeroed buffer); and, in a case without a generation stream, Liger-Kernel's and quack's kernels, which
have one weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unigendet.ops import rms_norm

from .candidate import Function
from .contest import Case, Work
from .judge import whole
from .published import plain_norm
from .stream_case import candidates, library, random, streams

OP = "rms_norm"
EPS = 1e-6


def case(device: torch.device, dtype: torch.dtype, rows: int, columns: int) -> Case:
    """Rows of both streams with a residual; everything wants a gradient."""
    layout, n = streams(rows)
    und, gen = torch.arange(n, device=device), torch.arange(n, rows, device=device)

    def own(x: Tensor, residual: Tensor, weight_und: Tensor, weight_gen: Tensor, backend: str) -> tuple[Tensor, ...]:
        return rms_norm(x, (weight_und, weight_gen), layout, residual=residual, eps=EPS, backend=backend)

    def eager(x: Tensor, residual: Tensor, weight_und: Tensor, weight_gen: Tensor) -> tuple[Tensor, Tensor]:
        summed = x + residual
        parts = zip(summed.split((n, rows - n)), (weight_und, weight_gen), strict=True)
        return torch.cat([F.rms_norm(part, (columns,), weight, EPS) for part, weight in parts]), summed

    def published(x: Tensor, residual: Tensor, weight_und: Tensor, weight_gen: Tensor) -> tuple[Tensor, Tensor]:
        summed = x + residual
        normed = torch.zeros_like(summed)
        normed[und] = plain_norm(summed[und], weight_und, EPS)
        normed[gen] = plain_norm(summed[gen], weight_gen, EPS)
        return normed, summed

    more = {"published": lambda: published}
    return _case(device, dtype, f"{rows} x {columns}", rows, columns, 2, own, eager, more)


def one_stream_case(device: torch.device, dtype: torch.dtype, rows: int, columns: int) -> Case:
    """The same without a generation stream: all that kernels for one weight can do."""
    layout = SimpleNamespace(stream_lengths=torch.tensor([rows, 0]))

    def own(x: Tensor, residual: Tensor, weight: Tensor, backend: str) -> tuple[Tensor, ...]:
        return rms_norm(x, (weight, weight.detach()), layout, residual=residual, eps=EPS, backend=backend)

    def eager(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        summed = x + residual
        return F.rms_norm(summed, (columns,), weight, EPS), summed

    more = {"liger": partial(_liger, device), "quack": partial(_quack, device)}
    return _case(device, dtype, f"{rows} x {columns}, one stream", rows, columns, 1, own, eager, more)


def _case(
    device: torch.device,
    dtype: torch.dtype,
    shape: str,
    rows: int,
    columns: int,
    weights: int,
    own: Callable[..., Any],
    eager: Function,
    more: Mapping[str, Callable[[], Function]],
) -> Case:
    def inputs(seed: int) -> tuple[Tensor, ...]:
        make = random(device, dtype, seed)
        return tuple(x.requires_grad_() for x in (make(rows, columns), make(rows, columns), *make(weights, columns)))

    size = dtype.itemsize * rows * columns
    return Case(
        OP,
        shape,
        dtype,
        inputs,
        # Forward x, residual, normed, sum; backward their gradients and the sum.
        work={"forward": Work(bytes=4 * size), "backward": Work(bytes=4 * size)},
        truth=whole(partial(own, backend="reference")),
        **candidates(OP, device, dtype, eager, own, more),
    )


def _liger(device: torch.device) -> Function:
    function = library("liger-kernel", "liger_kernel.ops.fused_add_rms_norm", "LigerFusedAddRMSNormFunction", device)
    return lambda x, residual, weight: function.apply(x, residual, weight, EPS, 0.0, "llama", False)


def _quack(device: torch.device) -> Function:
    function = library("quack", "quack", "rmsnorm", device)
    return lambda x, residual, weight: function(x, weight, residual=residual, eps=EPS, prenorm=True)


def cases(device: torch.device, size: str) -> Iterator[Case]:
    """BAGEL-7B's width in bfloat16 on GPUs, a small model's in float32 on CPUs."""
    sizes = torch.float32, 4096, 512
    if size == "tiny":
        sizes = torch.float32, 24, 16
    elif device.type == "cuda":
        sizes = torch.bfloat16, 16384, 3584
    yield case(device, *sizes)
    if size != "quick":
        yield one_stream_case(device, *sizes)
