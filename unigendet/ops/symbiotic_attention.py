"""Symbiotic multimodal self-attention (paper section 3.2): one attention over all of a pack's tokens, of both streams.

For query row i of head h, with g = h // (Hq / Hkv) its key/value head (grouped-query attention):

    s[i, j] = scale · q[i, h] · k[j, g]                    over the visible keys j of row i
    lse[h, i] = log Σ_j exp s[i, j]
    out[i, h] = Σ_j exp(s[i, j] − lse[h, i]) v[j, g]

Which keys are visible is the layout's business: query row i sees key row j iff query_begin[j] <= i < query_end[j].

Backward, with P = exp(s − lse), incoming gradients dO of out and dL of lse, and
delta[h, i] = dO[i, h] · out[i, h] − dL[h, i]:

    dV = Pᵀ dO        dS = P ∘ (dO Vᵀ − delta)        dQ = scale · dS K        dK = scale · dSᵀ Q

summed over the query heads of a group. q, k and v come in sequence order; the output is stored in sequence order or, so
that the next linear layer needs no permutation, stream-major.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from unigendet.layout import Layout, visible
from unigendet.ops import symbiotic_attention_extension as extension_backend
from unigendet.ops import symbiotic_attention_flash as flash_backend
from unigendet.ops import symbiotic_attention_torch as torch_backend
from unigendet.ops import symbiotic_attention_triton as triton_backend
from unigendet.ops._arguments import compute_dtype, reject
from unigendet.ops.backends import resolve, run

MAX_HEAD_DIM = 128


def symbiotic_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    scale: float | None = None,
    out_order: Literal["sequence", "stream"] = "sequence",
    backend: str = "auto",
    return_lse: bool = False,
    deterministic: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a pack (paper section 3.2). Differentiable in q, k and v, also through lse (not with ``flash``).

    Args:
        q: [T, Hq, D], sequence order, any strides; float32, bfloat16, float16 (float64 on ``reference`` and ``torch``).
        k: [K, Hkv, D], one row per key row of the layout (K = T without cache). Hkv divides Hq.
        v: [K, Hkv, D].
        layout: T queries, K keys, on the device of q.
        scale: factor of the scores; default 1/sqrt(D).
        out_order: order of the output's rows: ``"sequence"`` or ``"stream"`` (stream-major).
        backend: "auto", "reference", "torch", "triton", "cpp" (on CPUs) or "flash".
        return_lse: also return the log-sum-exp of each row's scores.
        deterministic: the same bits in every run. False lets ``triton`` add up the gradient of q with atomics: fewer
            operations, in no fixed order, unless ``torch.use_deterministic_algorithms`` forbids it. The other backends
            pay no attention to it.

    Returns:
        Output [T, Hq, D] in q's dtype; with ``return_lse`` also lse [Hq, T], natural logarithm, sequence order, float32
        (float64 for float64 input).

    Raises:
        ValueError: a shape, dtype, device or name does not fit; the message says what it is and what it must be.
    """
    _check(q, k, v, layout)
    if out_order not in ("sequence", "stream"):
        raise ValueError(f"out_order is {out_order!r}; it must be 'sequence' or 'stream'")
    chosen = resolve("symbiotic_attention", backend, q)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    out_rows = layout.sequence_to_stream if out_order == "stream" else None
    out, lse = torch.ops.unigendet.symbiotic_attention(
        q, k, v, layout.query_begin, layout.query_end, layout.splits, out_rows, scale, chosen, deterministic
    )
    return (out, lse) if return_lse else out


def _check(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> None:
    if not isinstance(layout, Layout):
        reject("layout", f"a {type(layout).__name__}", "a Layout")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            reject(name, f"a {type(x).__name__}", "a tensor [tokens, heads, head_dim]")
        if x.dim() != 3 or x.shape[1] == 0 or not 1 <= x.shape[2] <= MAX_HEAD_DIM:
            raise ValueError(
                f"{name} has shape {list(x.shape)}; it must be [tokens, heads, head_dim] with at least one head and "
                f"head_dim from 1 to {MAX_HEAD_DIM}"
            )
        if not x.dtype.is_floating_point or x.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {x.dtype}; q, k and v must share one floating dtype (q has {q.dtype})")
        if x.device != layout.query_begin.device:
            raise ValueError(f"{name} is on {x.device}; it must be on the layout's device, {layout.query_begin.device}")
    if k.shape != v.shape or k.shape[2] != q.shape[2]:
        raise ValueError(
            f"k has shape {list(k.shape)} and v {list(v.shape)}; both must be [keys, kv_heads, {q.shape[2]}]"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads; it must be a multiple of the {k.shape[1]} heads of k and v")
    if q.shape[0] != layout.key_rows.shape[0]:
        raise ValueError(f"q has {q.shape[0]} rows; the layout has {layout.key_rows.shape[0]} queries")
    if k.shape[0] != layout.query_begin.shape[0]:
        raise ValueError(f"k and v have {k.shape[0]} rows; the layout has {layout.query_begin.shape[0]} keys")


@torch.library.custom_op("unigendet::symbiotic_attention", mutates_args=())
def _op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_begin: Tensor,
    query_end: Tensor,
    splits: Tensor,
    out_rows: Tensor | None,
    scale: float,
    backend: str,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor]:
    return run(_FORWARD, backend, q, k, v, query_begin, query_end, splits, out_rows, scale)


@_op.register_fake
def _(q, k, v, query_begin, query_end, splits, out_rows, scale, backend, deterministic=True):  # noqa: ANN001, ANN202
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=compute_dtype(q))


@torch.library.custom_op("unigendet::symbiotic_attention_backward", mutates_args=())
def _backward_op(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    query_begin: Tensor,
    query_end: Tensor,
    splits: Tensor,
    out_rows: Tensor | None,
    scale: float,
    backend: str,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    inputs = (grad_out, grad_lse, q, k, v, out, lse, query_begin, query_end, splits, out_rows, scale)
    return run(_BACKWARD, backend, *inputs, deterministic)


@_backward_op.register_fake
def _(grad_out, grad_lse, q, k, v, *_rest):  # noqa: ANN001, ANN002, ANN202
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:  # noqa: ANN001
    q, k, v, query_begin, query_end, splits, out_rows, ctx.scale, ctx.backend, ctx.deterministic = inputs
    ctx.set_materialize_grads(False)  # an unused lse must not cost a pass with a gradient of zeros
    ctx.save_for_backward(q, k, v, *output, query_begin, query_end, splits, out_rows)


def _autograd_backward(ctx, grad_out, grad_lse):  # noqa: ANN001, ANN202
    if grad_out is None and grad_lse is None:
        return (None,) * 10
    grads = torch.ops.unigendet.symbiotic_attention_backward(
        grad_out, grad_lse, *ctx.saved_tensors, ctx.scale, ctx.backend, ctx.deterministic
    )
    return (*grads, *(None,) * 7)


_op.register_autograd(_autograd_backward, setup_context=_setup_context)


def _dense(q: Tensor, k: Tensor, v: Tensor, query_begin: Tensor, query_end: Tensor, scale: float) -> tuple[Tensor, ...]:
    """q [Hkv, G, T, D], k and v [Hkv, K, D] and the masked scores [Hkv, G, T, K], in full precision."""
    dtype = compute_dtype(q)
    query = torch.arange(q.shape[0], device=q.device)
    mask = visible(query[:, None], query_begin[None, :], query_end[None, :])
    # A key row that nobody sees may be spare memory of a cache: whatever it holds must not reach a product with zero.
    seen = (query_begin < query_end)[:, None, None]
    q = q.to(dtype).unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3)
    k, v = (torch.where(seen, x.to(dtype), 0).transpose(0, 1) for x in (k, v))
    scores = (q @ k.unsqueeze(1).transpose(-1, -2) * scale).masked_fill(~mask, float("-inf"))
    return q, k, v, scores


def _reference(
    q: Tensor, k: Tensor, v: Tensor, query_begin: Tensor, query_end: Tensor, _: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    _, _, values, scores = _dense(q, k, v, query_begin, query_end, scale)
    # Not exp(s − lse): that inherits the rounding of lse, which is large where lse is.
    out = scores.softmax(-1) @ values.unsqueeze(1)
    return out.permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype).contiguous(), scores.logsumexp(-1).flatten(0, 1)


def _reference_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    query_begin: Tensor,
    query_end: Tensor,
    _: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    queries, keys, values, scores = _dense(q, k, v, query_begin, query_end, scale)
    by_group = lambda x: x.to(queries.dtype).unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3)  # noqa: E731
    grad = by_group(grad_out)
    lse = lse.unflatten(0, (k.shape[1], -1))
    p = torch.exp(scores - lse.unsqueeze(-1))
    delta = (grad * by_group(out)).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse.unflatten(0, (k.shape[1], -1))
    ds = p * (grad @ values.unsqueeze(1).transpose(-1, -2) - delta.unsqueeze(-1))
    dq = (scale * ds @ keys.unsqueeze(1)).permute(2, 0, 1, 3).flatten(1, 2)
    dk = (scale * ds.transpose(-1, -2) @ queries).sum(1).transpose(0, 1)
    dv = (p.transpose(-1, -2) @ grad).sum(1).transpose(0, 1)
    return dq.to(q.dtype).contiguous(), dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous()


def _torch(
    q: Tensor, k: Tensor, v: Tensor, _: Tensor, __: Tensor, splits: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return torch_backend.forward(q, k, v, splits, scale)


def _torch_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    _: Tensor,
    __: Tensor,
    splits: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch_backend.backward(grad_out, grad_lse, q, k, v, out, lse, splits, scale)


def _flash(
    q: Tensor, k: Tensor, v: Tensor, _: Tensor, __: Tensor, splits: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return flash_backend.forward(q, k, v, splits, scale)


def _flash_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    _: Tensor,
    __: Tensor,
    splits: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return flash_backend.backward(grad_out, grad_lse, q, k, v, out, lse, splits, scale)


def _storing_rows(forward: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """``forward``, with row t of its output stored at out_rows[t]."""

    def call(*arguments: Any) -> tuple[Tensor, Tensor]:
        *inputs, out_rows, scale = arguments
        out, lse = forward(*inputs, scale)
        return out if out_rows is None else torch.empty_like(out).index_copy_(0, out_rows, out), lse

    return call


def _loading_rows(backward: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """``backward`` of a ``forward`` under ``_storing_rows``; always deterministic."""

    def call(
        grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *rest: Any
    ) -> Any:
        *rest, out_rows, scale, _ = rest
        if out_rows is not None:
            out, grad_out = out.index_select(0, out_rows), grad_out.index_select(0, out_rows)
        return backward(grad_out, grad_lse, q, k, v, out, *rest, scale)

    return call


_FORWARD = {
    "reference": _storing_rows(_reference),
    "torch": _storing_rows(_torch),
    "flash": _storing_rows(_flash),
    "triton": triton_backend.forward,
    "cpp": extension_backend.forward,
}
_BACKWARD = {
    "reference": _loading_rows(_reference_backward),
    "torch": _loading_rows(_torch_backward),
    "flash": _loading_rows(_flash_backward),
    "triton": triton_backend.backward,
    "cpp": extension_backend.backward,
}
