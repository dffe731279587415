"""SwiGLU: the gated activation of the decoder's MLP, on the fused (gate | up) projection.

With σ the logistic function:

    forward    y = silu(g) · u,   silu(g) = g σ(g)
    backward   dg = dy · u · σ(g) (1 + g (1 − σ(g)))        du = dy · silu(g)

The gradient of (gate | up) is written into the two halves of one buffer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unigendet.ops import rows_extension
from unigendet.ops._arguments import check_floating, compute_dtype, reject
from unigendet.ops._blocks import row_blocks
from unigendet.ops._launching import run_launches, unit_stride
from unigendet.ops.backends import resolve, run


def _reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.to(compute_dtype(gate_up)).chunk(2, dim=1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


def _torch(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=1)
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    for rows in row_blocks(0, *gate.shape, gate.device):
        torch.mul(F.silu(gate[rows]), up[rows], out=y[rows])
    return y


def _reference_backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    dtype = compute_dtype(gate_up)
    gate, up = gate_up.to(dtype).chunk(2, dim=1)
    sigmoid = torch.sigmoid(gate)
    dgate = dy.to(dtype) * up * sigmoid * (1 + gate * (1 - sigmoid))
    dup = dy.to(dtype) * gate * sigmoid
    return torch.cat((dgate, dup), dim=1).to(gate_up.dtype)


def _torch_backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=1)
    gradient = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    dgate, dup = gradient.chunk(2, dim=1)
    for rows in row_blocks(0, *gate.shape, gate.device):
        torch.ops.aten.silu_backward.grad_input(dy[rows] * up[rows], gate[rows], grad_input=dgate[rows])
        torch.mul(dy[rows], F.silu(gate[rows]), out=dup[rows])
    return gradient


def _triton(gate_up: Tensor) -> Tensor:
    from unigendet.kernels.swiglu import forward

    y = torch.empty((gate_up.shape[0], gate_up.shape[1] // 2), dtype=gate_up.dtype, device=gate_up.device)
    run_launches(forward(unit_stride(gate_up), y), gate_up)
    return y


def _triton_backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    from unigendet.kernels.swiglu import backward

    gradient = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    run_launches(backward(unit_stride(dy), unit_stride(gate_up), gradient), gate_up)
    return gradient


def _cpp(gate_up: Tensor) -> Tensor:
    y = torch.empty((gate_up.shape[0], gate_up.shape[1] // 2), dtype=gate_up.dtype, device=gate_up.device)
    rows_extension.swiglu(gate_up, y)
    return y


def _cpp_backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    gradient = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    rows_extension.swiglu_backward(dy, gate_up, gradient)
    return gradient


_FORWARD = {"reference": _reference, "torch": _torch, "triton": _triton, "cpp": _cpp}
_BACKWARD = {
    "reference": _reference_backward,
    "torch": _torch_backward,
    "triton": _triton_backward,
    "cpp": _cpp_backward,
}


@torch.library.custom_op("unigendet::swiglu", mutates_args=())
def _swiglu(gate_up: Tensor, backend: str) -> Tensor:
    return run(_FORWARD, backend, gate_up)


@_swiglu.register_fake
def _(gate_up: Tensor, _: str) -> Tensor:
    return torch.empty((gate_up.shape[0], gate_up.shape[1] // 2), dtype=gate_up.dtype, device=gate_up.device)


@torch.library.custom_op("unigendet::swiglu_backward", mutates_args=())
def _swiglu_backward(dy: Tensor, gate_up: Tensor, backend: str) -> Tensor:
    return run(_BACKWARD, backend, dy, gate_up)


@_swiglu_backward.register_fake
def _(_: Tensor, gate_up: Tensor, __: str) -> Tensor:
    return torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    gate_up, ctx.backend = inputs
    ctx.save_for_backward(gate_up)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    return _swiglu_backward(dy, *ctx.saved_tensors, ctx.backend), None


_swiglu.register_autograd(_autograd, setup_context=_setup_context)


def swiglu(gate_up: Tensor, *, backend: str = "auto") -> Tensor:
    """Return silu(gate) · up for the fused projection ``gate_up`` = (gate | up) (docs/model.md §4).

    Args:
        gate_up: [T, 2·I], any floating dtype, any strides.
        backend: "auto", "reference", "torch", "triton" or "cpp" (on CPUs).

    Returns:
        [T, I] in gate_up's dtype.

    Raises:
        ValueError: ``gate_up`` has another shape or dtype, or ``backend`` cannot run this.
    """
    check_floating("gate_up", gate_up, ("T", "2*I"))
    if gate_up.shape[1] % 2:
        reject("gate_up", gate_up, "of shape [T, 2*I]: its second size must be even")
    return _swiglu(gate_up, resolve("swiglu", backend, gate_up))
