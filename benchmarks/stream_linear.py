"""``stream_linear``: both streams' matrix products into one buffer.

Peers: two products on slices and a concatenation, eager and compiled; the published way (each stream is gathered,
multiplied, and scattered into a zeroed buffer); one grouped matrix product, which wants the weights stacked, in its
time.
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

    def inputs(seed: int) -> tuple[Tensor, ...]:
        make = random(device, dtype, seed)
        weights = (make(out, columns) * columns**-0.5 for _ in range(2))
        return tuple(x.requires_grad_() for x in (make(rows, columns), *weights))

    def own(x: Tensor, weight_und: Tensor, weight_gen: Tensor, backend: str) -> Tensor:
        return stream_linear(x, (weight_und, weight_gen), layout, backend=backend)

    def eager(x: Tensor, weight_und: Tensor, weight_gen: Tensor) -> Tensor:
        return torch.cat((F.linear(x[:n], weight_und), F.linear(x[n:], weight_gen)))

    def published(x: Tensor, weight_und: Tensor, weight_gen: Tensor) -> Tensor:
        y = torch.zeros(rows, out, device=x.device, dtype=x.dtype)
        y[und] = F.linear(x[und], weight_und)
        y[gen] = F.linear(x[gen], weight_gen)
        return y

    def grouped() -> Function:
        raise_if_not_cuda(device)
        both = lambda *weights: torch.stack(weights).transpose(1, 2)  # noqa: E731
        return lambda x, *weights: torch.nn.functional.grouped_mm(x, both(*weights), offs=ends)

    more = {"published": lambda: published, "grouped_mm": grouped}
    flops, read = 2 * rows * columns * out, rows * columns + 2 * columns * out  # x and the weights
    sizes = {"forward": dtype.itemsize * (read + rows * out), "backward": dtype.itemsize * (2 * read + rows * out)}
    return Case(
        OP,
        f"{rows} x {columns} to {out}",
        dtype,
        inputs,
        work={"forward": Work(flops, sizes["forward"]), "backward": Work(2 * flops, sizes["backward"])},
        truth=whole(partial(own, backend="reference")),
        **candidates(OP, device, dtype, eager, own, more, backends=("torch",)),  # cuBLAS on GPUs
    )


def cases(device: torch.device, size: str) -> Iterator[Case]:
    """BAGEL-7B's width in bfloat16 on GPUs, a small model's in float32 on CPUs."""
    if size == "tiny":
        yield case(device, torch.float32, 24, 16, 16)
    elif device.type == "cuda":
        yield case(device, torch.bfloat16, 16384, 3584, 3584)
    else:
        yield case(device, torch.float32, 4096, 512, 512)
