"""One linear layer with a weight set per stream (docs/model.md §1), over rows in stream-major order.

With x = (x_u; x_g), the understanding rows followed by the generation rows, and s in {u, g}:

    forward    y_s = x_s W_sᵀ + b_s
    backward   dx_s = dy_s W_s        dW_s = dy_sᵀ x_s        db_s = Σ_rows dy_s

Both streams' products are written into the two parts of one buffer, forward and backward: there is no slice,
concatenation or zero-fill for autograd to undo. Gradients that nobody needs are not computed, and what only they read
is not saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unigendet.ops._arguments import (
    autocast,
    check_floating,
    check_stream_lengths,
    compute_dtype,
    empty_unless,
    first_stream,
    reject,
)
from unigendet.ops.backends import resolve, run

if TYPE_CHECKING:
    from unigendet.layout import Layout

# Shapes: x [T, in], weights [out, in], biases [out], dy and y [T, out]; the streams' rows are [:n] and [n:].


def _reference(
    x: Tensor, weight_und: Tensor, weight_gen: Tensor, bias_und: Tensor | None, bias_gen: Tensor | None, lengths: Tensor
) -> Tensor:
    n = first_stream("x", x, lengths)
    dtype = compute_dtype(x)
    parts = []
    for rows, weight, bias in ((x[:n], weight_und, bias_und), (x[n:], weight_gen, bias_gen)):
        y = rows.to(dtype) @ weight.to(dtype).T
        parts.append(y if bias is None else y + bias.to(dtype))
    return torch.cat(parts).to(x.dtype)


def _torch(
    x: Tensor, weight_und: Tensor, weight_gen: Tensor, bias_und: Tensor | None, bias_gen: Tensor | None, lengths: Tensor
) -> Tensor:
    n = first_stream("x", x, lengths)
    y = torch.empty((x.shape[0], weight_und.shape[0]), dtype=x.dtype, device=x.device)
    for rows, out, weight, bias in ((x[:n], y[:n], weight_und, bias_und), (x[n:], y[n:], weight_gen, bias_gen)):
        if bias is None:
            torch.mm(rows, weight.T, out=out)
        else:
            torch.addmm(bias, rows, weight.T, out=out)
    return y


def _reference_backward(
    dy: Tensor,
    x: Tensor | None,
    weight_und: Tensor | None,
    weight_gen: Tensor | None,
    lengths: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    n = first_stream("dy", dy, lengths)
    dtype = compute_dtype(dy)
    streams = (slice(0, n), slice(n, None))
    dy = dy.to(dtype)
    results = [torch.empty(0, dtype=dtype, device=dy.device) for _ in range(5)]
    if output_mask[0]:
        results[0] = torch.cat([dy[s] @ w.to(dtype) for s, w in zip(streams, (weight_und, weight_gen), strict=True)])
    for i, s in enumerate(streams):
        if output_mask[1 + i]:
            results[1 + i] = dy[s].T @ x[s].to(dtype)
        if output_mask[3 + i]:
            results[3 + i] = dy[s].sum(0)
    return tuple(results)


def _torch_backward(
    dy: Tensor,
    x: Tensor | None,
    weight_und: Tensor | None,
    weight_gen: Tensor | None,
    lengths: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    n = first_stream("dy", dy, lengths)
    results = _allocate_gradients(dy, x, weight_und, output_mask)
    for i, (s, weight) in enumerate(((slice(0, n), weight_und), (slice(n, None), weight_gen))):
        if output_mask[0]:
            torch.mm(dy[s], weight, out=results[0][s])
        if output_mask[1 + i]:
            torch.mm(dy[s].T, x[s], out=results[1 + i])
        if output_mask[3 + i]:
            torch.sum(dy[s], 0, out=results[3 + i])
    return results


def _allocate_gradients(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, output_mask: Sequence[bool]
) -> tuple[Tensor, ...]:
    rows, out_features = dy.shape
    in_features = x.shape[1] if x is not None else weight.shape[1] if weight is not None else 0
    shapes = ((rows, in_features), *[(out_features, in_features)] * 2, *[(out_features,)] * 2)
    return tuple(empty_unless(m, shape, dy.dtype, dy.device) for m, shape in zip(output_mask, shapes, strict=True))


_FORWARD = {"reference": _reference, "torch": _torch}
_BACKWARD = {"reference": _reference_backward, "torch": _torch_backward}


@torch.library.custom_op("unigendet::stream_linear", mutates_args=())
def _stream_linear(
    x: Tensor,
    weight_und: Tensor,
    weight_gen: Tensor,
    bias_und: Tensor | None,
    bias_gen: Tensor | None,
    stream_lengths: Tensor,
    backend: str,
) -> Tensor:
    return run(_FORWARD, backend, x, weight_und, weight_gen, bias_und, bias_gen, stream_lengths)


@_stream_linear.register_fake
def _(x: Tensor, weight_und: Tensor, *_: Any) -> Tensor:
    return torch.empty((x.shape[0], weight_und.shape[0]), dtype=x.dtype, device=x.device)


@torch.library.custom_op("unigendet::stream_linear_backward", mutates_args=())
def _stream_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    weight_und: Tensor | None,
    weight_gen: Tensor | None,
    stream_lengths: Tensor,
    output_mask: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    results = run(_BACKWARD, backend, dy, x, weight_und, weight_gen, stream_lengths, output_mask)
    return tuple(result.to(dy.dtype) for result in results)


@_stream_linear_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor | None,
    weight_und: Tensor | None,
    weight_gen: Tensor | None,
    _: Tensor,
    output_mask: Sequence[bool],
    __: str,
) -> tuple[Tensor, ...]:
    return _allocate_gradients(dy, x, weight_und, output_mask)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight_und, weight_gen, _, _, stream_lengths, ctx.backend = inputs
    needs_x, *needs_weights = ctx.needs_input_grad[:3]
    # Under autocast the weights are copies: keep them, and x, only for the products that read them.
    weights = (weight_und, weight_gen) if needs_x else (None, None)
    ctx.save_for_backward(x if any(needs_weights) else None, *weights, stream_lengths)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    output_mask = list(ctx.needs_input_grad[:5])
    gradients = _stream_linear_backward(dy, *ctx.saved_tensors, output_mask, ctx.backend)
    return *(g if m else None for g, m in zip(gradients, output_mask, strict=True)), None, None


_stream_linear.register_autograd(_autograd, setup_context=_setup_context)


def stream_linear(
    x: Tensor,
    weights: tuple[Tensor, Tensor],
    layout: Layout,
    *,
    biases: tuple[Tensor | None, Tensor | None] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Multiply each stream's rows by that stream's weight: y = x W_sᵀ + b_s (docs/model.md §4).

    Args:
        x: [T, in], stream-major: all understanding rows, then all generation rows. Any strides.
        weights: (understanding, generation), each [out, in], of x's dtype (under autocast: of any).
        layout: its ``stream_lengths`` (int64 [2] on the CPU) are the two numbers of rows; either may be 0.
        biases: None, or (understanding, generation), each [out] or None.
        backend: "auto", "reference" or "torch".

    Returns:
        [T, out] in x's dtype, stream-major; under autocast x, weights and biases are cast to its dtype first.

    Raises:
        ValueError: a shape, dtype or device does not fit, or ``backend`` cannot run this.
    """
    weight_und, weight_gen = weights
    bias_und, bias_gen = (None, None) if biases is None else biases
    if not isinstance(x, Tensor):
        reject("x", x, "a floating-point tensor of shape [T, in]")
    tensors = autocast(x, weight_und, weight_gen, bias_und, bias_gen)
    x, weight_und, weight_gen, bias_und, bias_gen = tensors
    check_floating("x", x, ("T", "in"))
    check_floating("weights[0]", weight_und, ("out", x.shape[1]), x.dtype)
    check_floating("weights[1]", weight_gen, (weight_und.shape[0], x.shape[1]), x.dtype)
    for name, bias in (("biases[0]", bias_und), ("biases[1]", bias_gen)):
        if bias is not None:
            check_floating(name, bias, (weight_und.shape[0],), x.dtype)
    check_stream_lengths(layout.stream_lengths)
    return _stream_linear(*tensors, layout.stream_lengths, resolve("stream_linear", backend, *tensors))
