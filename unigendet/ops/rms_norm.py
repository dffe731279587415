"""Residual add and RMSNorm in one op, with a norm weight per stream.

With s = x + r (or x, without a residual) rounded to x's dtype, D columns, and w the weight of the row's stream:

    forward    rstd = 1 / sqrt(mean(s²) + eps)        h = s · rstd, rounded to x's dtype        y = w · h
    backward   g = dy · w
               ds = dsummed + rstd · (g − h · mean(g · h))        dx = dr = ds
               dw = Σ_rows dy · h        (the rows of that stream)

The casts are those of the Qwen2 decoder: statistics in float32 (float64 for float64), then the rounding of h before the
weight. The backward pass recomputes h from s and rstd, unrounded. The operator returns (y, s, rstd), where rstd [T]
only serves the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unigendet.ops import rows_extension
from unigendet.ops._arguments import (
    check_columns,
    check_floating,
    check_stream_lengths,
    compute_dtype,
    empty_unless,
    first_stream,
)
from unigendet.ops._blocks import stream_blocks
from unigendet.ops._launching import run_launches, unit_stride
from unigendet.ops.backends import resolve, run

if TYPE_CHECKING:
    from unigendet.layout import Layout

# Shapes: x, residual, summed, normed [T, D]; rstd [T]; weights [D]; the streams' rows are [:n] and [n:].


def _reference(
    x: Tensor, residual: Tensor | None, weight_und: Tensor, weight_gen: Tensor, lengths: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    n = first_stream("x", x, lengths)
    summed = x if residual is None else x + residual
    wide = summed.to(compute_dtype(x))
    rstd = torch.rsqrt(wide.square().mean(1) + eps)
    h = (wide * rstd[:, None]).to(x.dtype)
    normed = torch.cat((weight_und.to(x.dtype) * h[:n], weight_gen.to(x.dtype) * h[n:]))
    return normed, torch.empty(0, dtype=x.dtype, device=x.device) if residual is None else summed, rstd


def _torch(
    x: Tensor, residual: Tensor | None, weight_und: Tensor, weight_gen: Tensor, lengths: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    n = first_stream("x", x, lengths)
    normed, summed, rstd = _allocate(x, residual)
    weights = (weight_und.to(x.dtype), weight_gen.to(x.dtype))
    for stream, rows in stream_blocks(n, *x.shape, x.device):
        source = x[rows] if residual is None else torch.add(x[rows], residual[rows], out=summed[rows])
        wide = source.to(rstd.dtype)
        torch.linalg.vecdot(wide, wide, out=rstd[rows]).div_(x.shape[1]).add_(eps).rsqrt_()
        torch.mul(wide, rstd[rows, None], out=normed[rows])  # computed in rstd's dtype, rounded to x's
        normed[rows] *= weights[stream]
    return normed, summed, rstd


def _reference_backward(
    dy: Tensor,
    dsummed: Tensor | None,
    summed: Tensor,
    rstd: Tensor,
    weight_und: Tensor,
    weight_gen: Tensor,
    lengths: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    n = first_stream("dy", dy, lengths)
    dy = dy.to(rstd.dtype)
    h = summed.to(rstd.dtype) * rstd[:, None]
    g = torch.cat((dy[:n] * weight_und.to(rstd.dtype), dy[n:] * weight_gen.to(rstd.dtype)))
    ds = rstd[:, None] * (g - h * (g * h).mean(1, keepdim=True))
    if dsummed is not None:
        ds = ds + dsummed
    product = dy * h
    gradients = (ds.to(summed.dtype), product[:n].sum(0).to(weight_und.dtype), product[n:].sum(0).to(weight_gen.dtype))
    return tuple(
        g if m else torch.empty(0, dtype=g.dtype, device=g.device) for g, m in zip(gradients, output_mask, strict=True)
    )


def _torch_backward(
    dy: Tensor,
    dsummed: Tensor | None,
    summed: Tensor,
    rstd: Tensor,
    weight_und: Tensor,
    weight_gen: Tensor,
    lengths: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    n = first_stream("dy", dy, lengths)
    gradients = _allocate_gradients(summed, weight_und, weight_gen, output_mask)
    weights = (weight_und, weight_gen)
    sums = torch.zeros((2, summed.shape[1]), dtype=rstd.dtype, device=rstd.device)
    for stream, rows in stream_blocks(n, *summed.shape, summed.device):
        h = summed[rows] * rstd[rows, None]  # [block, D] in rstd's dtype, as all that follows
        if output_mask[1 + stream]:
            sums[stream] += (dy[rows] * h).sum(0)
        if output_mask[0]:
            g = dy[rows].to(rstd.dtype) * weights[stream]
            mean = torch.linalg.vecdot(g, h).div_(h.shape[1])
            g.sub_(h.mul_(mean[:, None])).mul_(rstd[rows, None])
            gradients[0][rows].copy_(g if dsummed is None else g.add_(dsummed[rows]))
    for stream in range(2):
        if output_mask[1 + stream]:
            gradients[1 + stream].copy_(sums[stream])
    return gradients


def _triton(
    x: Tensor, residual: Tensor | None, weight_und: Tensor, weight_gen: Tensor, lengths: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    from unigendet.kernels.rms_norm import forward

    n = first_stream("x", x, lengths)
    normed, summed, rstd = _allocate(x, residual)
    outputs = (None if residual is None else summed, rstd, normed)
    inputs = (unit_stride(x), None if residual is None else unit_stride(residual))
    run_launches(forward(*inputs, _weights(weight_und, weight_gen), *outputs, n, eps), x)
    return normed, summed, rstd


def _triton_backward(
    dy: Tensor,
    dsummed: Tensor | None,
    summed: Tensor,
    rstd: Tensor,
    weight_und: Tensor,
    weight_gen: Tensor,
    lengths: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    from unigendet.kernels.rms_norm import backward, backward_programs

    n = first_stream("dy", dy, lengths)
    gradients = _allocate_gradients(summed, weight_und, weight_gen, output_mask)
    ds, *dweights = (g if m else None for g, m in zip(gradients, output_mask, strict=True))
    partials = None
    if any(output_mask[1:]):
        programs = backward_programs(summed.shape[0], n, summed.shape[1])[-1]
        partials = torch.empty((programs, summed.shape[1]), dtype=torch.float32, device=summed.device)
    inputs = (unit_stride(dy), None if dsummed is None else unit_stride(dsummed), unit_stride(summed), rstd)
    run_launches(backward(*inputs, _weights(weight_und, weight_gen), ds, dweights, partials, n), dy)
    return gradients


def _cpp(
    x: Tensor, residual: Tensor | None, weight_und: Tensor, weight_gen: Tensor, lengths: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    n = first_stream("x", x, lengths)
    outputs = _allocate(x, residual)
    rows_extension.rms_norm(x, residual, (weight_und, weight_gen), n, eps, outputs)
    return outputs


def _cpp_backward(
    dy: Tensor,
    dsummed: Tensor | None,
    summed: Tensor,
    rstd: Tensor,
    weight_und: Tensor,
    weight_gen: Tensor,
    lengths: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    n = first_stream("dy", dy, lengths)
    gradients = _allocate_gradients(summed, weight_und, weight_gen, output_mask)
    weights = (weight_und, weight_gen)
    rows_extension.rms_norm_backward(dy, dsummed, summed, rstd, weights, n, output_mask, gradients)
    return gradients


def _weights(*weights: Tensor) -> list[Tensor]:
    """The weights, contiguous and of one dtype, since a kernel chooses between them: float32 if they differ."""
    dtype = weights[0].dtype if weights[0].dtype == weights[1].dtype != torch.float64 else torch.float32
    return [w.to(dtype).contiguous() for w in weights]


def _allocate(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    summed = empty_unless(residual is not None, x.shape, x.dtype, x.device)
    return normed, summed, torch.empty(x.shape[0], dtype=compute_dtype(x), device=x.device)


def _allocate_gradients(
    summed: Tensor, weight_und: Tensor, weight_gen: Tensor, output_mask: Sequence[bool]
) -> tuple[Tensor, ...]:
    sources = (summed, weight_und, weight_gen)
    return tuple(empty_unless(m, t.shape, t.dtype, t.device) for m, t in zip(output_mask, sources, strict=True))


_FORWARD = {"reference": _reference, "torch": _torch, "triton": _triton, "cpp": _cpp}
_BACKWARD = {
    "reference": _reference_backward,
    "torch": _torch_backward,
    "triton": _triton_backward,
    "cpp": _cpp_backward,
}


@torch.library.custom_op("unigendet::rms_norm", mutates_args=())
def _rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight_und: Tensor,
    weight_gen: Tensor,
    stream_lengths: Tensor,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return run(_FORWARD, backend, x, residual, weight_und, weight_gen, stream_lengths, eps)


@_rms_norm.register_fake
def _(x: Tensor, residual: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _allocate(x, residual)


@torch.library.custom_op("unigendet::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    dy: Tensor,
    dsummed: Tensor | None,
    summed: Tensor,
    rstd: Tensor,
    weight_und: Tensor,
    weight_gen: Tensor,
    stream_lengths: Tensor,
    output_mask: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return run(_BACKWARD, backend, dy, dsummed, summed, rstd, weight_und, weight_gen, stream_lengths, output_mask)


@_rms_norm_backward.register_fake
def _(
    dy: Tensor,
    dsummed: Tensor | None,
    summed: Tensor,
    rstd: Tensor,
    weight_und: Tensor,
    weight_gen: Tensor,
    _: Tensor,
    output_mask: Sequence[bool],
    __: str,
) -> tuple[Tensor, ...]:
    return _allocate_gradients(summed, weight_und, weight_gen, output_mask)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, residual, weight_und, weight_gen, stream_lengths, _, ctx.backend = inputs
    _, summed, rstd = output
    ctx.set_materialize_grads(False)  # an output that nobody uses must not cost a tensor of zeros
    ctx.mark_non_differentiable(rstd)
    ctx.has_residual = residual is not None
    ctx.save_for_backward(summed if ctx.has_residual else x, rstd, weight_und, weight_gen, stream_lengths)


def _autograd(ctx: Any, dy: Tensor | None, dsummed: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if not ctx.has_residual:
        dsummed = None
    if dy is None:
        return dsummed, dsummed, None, None, None, None, None
    needs_x, needs_residual, needs_und, needs_gen = ctx.needs_input_grad[:4]
    output_mask = [needs_x or needs_residual, needs_und, needs_gen]
    gradients = _rms_norm_backward(dy, dsummed, *ctx.saved_tensors, output_mask, ctx.backend)
    ds, dw_und, dw_gen = (g if m else None for g, m in zip(gradients, output_mask, strict=True))
    return ds, ds if ctx.has_residual else None, dw_und, dw_gen, None, None, None


_rms_norm.register_autograd(_autograd, setup_context=_setup_context)


def rms_norm(
    x: Tensor,
    weights: tuple[Tensor, Tensor],
    layout: Layout,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Add the residual, then scale every row by 1 / RMS and by its stream's weight (docs/model.md §4).

    Args:
        x: [T, D], stream-major, any floating dtype, any strides.
        weights: (understanding, generation), each [D], any floating dtype; they are rounded to x's.
        layout: its ``stream_lengths`` (int64 [2] on the CPU) are the two numbers of rows; either may be 0.
        residual: None or [T, D]; if its dtype is not x's, both are converted to the wider one first.
        eps: added to the mean square.
        backend: "auto", "reference", "torch", "triton" (at most 16384 columns) or "cpp" (on CPUs).

    Returns:
        normed [T, D] without a residual; (normed, x + residual) with one. Both take gradients.

    Raises:
        ValueError: a shape, dtype or device does not fit, or ``backend`` cannot run this.
    """
    weight_und, weight_gen = weights
    check_floating("x", x, ("T", "D"))
    check_columns("x", x)
    check_floating("weights[0]", weight_und, (x.shape[1],))
    check_floating("weights[1]", weight_gen, (x.shape[1],))
    if residual is not None:
        check_floating("residual", residual, (x.shape[0], x.shape[1]))
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    check_stream_lengths(layout.stream_lengths)
    chosen = resolve("rms_norm", backend, x, residual, weight_und, weight_gen)
    normed, summed, _ = _rms_norm(x, residual, weight_und, weight_gen, layout.stream_lengths, eps, chosen)
    return normed if residual is None else (normed, summed)
