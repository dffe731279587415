"""``swiglu``: SiLU(gate) · up on the fused projection.

Peers: plain PyTorch, eager and compiled; Liger-Kernel, whose two halves are contiguous tensors and are copied first.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from unigendet.ops import swiglu

from .candidate import Function
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
        **candidates(OP, device, dtype, eager, swiglu, {"liger": partial(_liger, device)}),
    )


def _liger(device: torch.device) -> Function:
    function = library("liger-kernel", "liger_kernel.ops.swiglu", "LigerSiLUMulFunction", device)
    return lambda gate_up: function.apply(*(x.contiguous() for x in gate_up.chunk(2, dim=1)))


def cases(device: torch.device, size: str) -> Iterator[Case]:
    """BAGEL-7B's MLP in bfloat16 on GPUs, a small model's in float32 on CPUs."""
    if size == "tiny":
        yield case(device, torch.float32, 24, 24)
    elif device.type == "cuda":
        yield case(device, torch.bfloat16, 16384, 18944)
    else:
        yield case(device, torch.float32, 4096, 1408)
