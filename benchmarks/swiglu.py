"""``swiglu``: SiLU(gate) · up on the fused projection.

Peers: plain PyTorch, eager and compiled; Liger-Kernel, which gets gate and up as contiguous tensors, but whose two
gradients are stacked in its time.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from unigendet.ops import swiglu

from .candidate import Candidate
from .contest import Case, Work
from .judge import whole
from .stream_case import candidates, library, random

OP = "swiglu"


def case(device: torch.device, dtype: torch.dtype, rows: int, width: int) -> Case:
    """gate_up [rows, 2·width]."""

    def inputs(seed: int) -> tuple[Tensor]:
        return (random(device, dtype, seed)(rows, 2 * width).requires_grad_(),)

    def eager(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=1)
        return F.silu(gate) * up

    size = dtype.itemsize * rows * width
    return Case(
        OP,
        f"{rows} x 2*{width}",
        dtype,
        inputs,
        work={"forward": Work(bytes=3 * size), "backward": Work(bytes=5 * size)},
        truth=whole(partial(swiglu, backend="reference")),
        **candidates(OP, device, dtype, eager, swiglu, {"liger": partial(_liger, device, width)}),
    )


def _liger(device: torch.device, width: int) -> Candidate:
    function = library("liger-kernel", "liger_kernel.ops.swiglu", "LigerSiLUMulFunction", device)
    halves = lambda x: torch.stack(x.chunk(2, dim=1)) if x.shape[1] == 2 * width else x  # noqa: E731
    whole_rows = lambda x: torch.cat(tuple(x), dim=1) if x.dim() == 3 else x  # noqa: E731
    return Candidate(lambda gate_up: function.apply(*gate_up.unbind()), halves, whole_rows)


def cases(device: torch.device, size: str) -> Iterator[Case]:
    """BAGEL-7B's MLP in bfloat16 on GPUs, a small model's in float32 on CPUs."""
    if size == "tiny":
        yield case(device, torch.float32, 24, 24)
    elif device.type == "cuda":
        yield case(device, torch.bfloat16, 16384, 18944)
    else:
        yield case(device, torch.float32, 4096, 1408)
