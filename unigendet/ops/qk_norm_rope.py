"""From the fused qkv projection to attention's q, k, v: per-head RMSNorm with the stream's weight, RoPE, new order.

The projection is stream-major; attention wants sequence order. This op reads and writes q, k and v anyway, so it moves
the rows too: no permutation is left over. For a head x (D numbers, halves x1 | x2) of q or k, in a row of stream s at
RoPE position p:

    rstd = 1 / sqrt(mean(x²) + eps)        h = x · rstd        n = w_s · h
    y1 = n1 · cos[p] − n2 · sin[p]         y2 = n2 · cos[p] + n1 · sin[p]

v is moved only. All arithmetic is in float32 (float64 for float64), rounded once, at the end. Backward, with dy the
gradient of y:

    dn1 = dy1 · cos[p] + dy2 · sin[p]      dn2 = dy2 · cos[p] − dy1 · sin[p]
    g = w_s · dn                           dx = rstd · (g − h · mean(g · h))
    dw_s = Σ dn · h                        over the stream's rows and the heads

With a cache, the new k and v are written straight into the cache's rows (``Layout.key_rows``): decoding copies nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from unigendet.layout import Layout
from unigendet.ops import qk_norm_rope_torch, rows_extension
from unigendet.ops._arguments import (
    check_floating,
    check_stream_lengths,
    compute_dtype,
    first_stream,
    reject,
)
from unigendet.ops._launching import capability, run_launches, unit_stride
from unigendet.ops.backends import resolve, run
from unigendet.ops.qk_norm_rope_torch import allocate, allocate_gradients, per_head, split

# Shapes: qkv [T, (Hq + 2 Hkv) D]; norm weights [D]; cos, sin [positions, D/2]; to_sequence, to_stream, positions [T].
# Streams' rows are [:n] and [n:] in stream-major order.


def rope_table(
    num_positions: int, head_dim: int, theta: float, *, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotation angles p · theta^(−2i/head_dim), each float32 [num_positions, head_dim/2]."""
    if head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}; it must be even, since RoPE rotates pairs")
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angle = torch.arange(num_positions, dtype=torch.float32, device=device)[:, None] * frequency
    return angle.cos(), angle.sin()


def _reference(
    qkv: Tensor,
    norms: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    maps: Sequence[Tensor],
    lengths: Tensor,
    heads: Sequence[int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    _, to_stream, positions = maps
    n = first_stream("qkv", qkv, lengths)
    dtype = compute_dtype(qkv)
    qk, v = (x.index_select(0, to_stream) for x in split(qkv, heads))
    x = qk.to(dtype)
    generation = (to_stream >= n)[:, None, None]
    q_und, q_gen, k_und, k_gen = (w.to(dtype) for w in norms)
    weight = torch.where(generation, per_head(q_gen, k_gen, heads), per_head(q_und, k_und, heads))
    normed = weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    c, s = (torch.cat((t, t), -1).to(dtype)[positions][:, None] for t in (cos, sin))
    first, second = normed.chunk(2, -1)
    y = (normed * c + torch.cat((-second, first), -1) * s).to(qkv.dtype)
    # Clones: a contiguous() of a single row would be a view, and an operator's outputs must not share memory.
    q, k = (part.clone(memory_format=torch.contiguous_format) for part in (y[:, : heads[0]], y[:, heads[0] :]))
    return q, k, v


def _reference_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    norms: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    maps: Sequence[Tensor],
    lengths: Tensor,
    heads: Sequence[int],
    eps: float,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    to_sequence, _, positions = maps
    n = first_stream("qkv", qkv, lengths)
    dtype = compute_dtype(qkv)
    x = split(qkv, heads)[0].to(dtype)
    dy = torch.cat((dq, dk), 1).index_select(0, to_sequence).to(dtype)
    c, s = (torch.cat((t, t), -1).to(dtype)[positions[to_sequence]][:, None] for t in (cos, sin))
    first, second = dy.chunk(2, -1)
    dn = dy * c + torch.cat((second, -first), -1) * s
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    h = x * rstd
    q_und, q_gen, k_und, k_gen = (w.to(dtype) for w in norms)
    generation = (torch.arange(len(x), device=x.device) >= n)[:, None, None]
    g = torch.where(generation, per_head(q_gen, k_gen, heads), per_head(q_und, k_und, heads)) * dn
    dx = rstd * (g - h * (g * h).mean(-1, keepdim=True))
    dqkv = torch.cat((dx.to(qkv.dtype), dv.index_select(0, to_sequence)), 1).flatten(1)
    dw = dn * h
    q, k = dw[:, : heads[0]], dw[:, heads[0] :]
    sums = [part.sum((0, 1)).to(w.dtype) for part, w in zip((q[:n], q[n:], k[:n], k[n:]), norms, strict=True)]
    return tuple(r if m else r.new_empty(0) for r, m in zip((dqkv, *sums), output_mask, strict=True))


def _triton(qkv: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    outputs = allocate(qkv, inputs[-2])
    _launch_forward(qkv, *inputs, None, outputs)
    return outputs


def _triton_into(qkv: Tensor, *inputs: Any) -> Tensor:
    *inputs, key_rows, cache = inputs
    if any(x.stride(-1) != 1 for x in cache):  # the kernel writes contiguous heads
        return _copying(_triton)(qkv, *inputs, key_rows, cache)
    q = allocate(qkv, inputs[-2])[0]
    _launch_forward(qkv, *inputs, key_rows, (q, *cache))
    return q


def _launch_forward(
    qkv: Tensor,
    norms: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    maps: Sequence[Tensor],
    lengths: Tensor,
    heads: Sequence[int],
    eps: float,
    key_rows: Tensor | None,
    outputs: Sequence[Tensor],
) -> None:
    from unigendet.kernels.qk_norm_rope import configure
    from unigendet.kernels.qk_norm_rope_forward import forward

    to_sequence, _, positions = maps
    n = first_stream("qkv", qkv, lengths)
    config = configure(capability(qkv) or (9, 0), heads, outputs[0].shape[2], "forward")
    inputs = (unit_stride(qkv), _weights(norms), unit_stride(cos), unit_stride(sin), to_sequence, positions, key_rows)
    run_launches(forward(config, *inputs, outputs, n, heads, eps), qkv)


def _triton_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    norms: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    maps: Sequence[Tensor],
    lengths: Tensor,
    heads: Sequence[int],
    eps: float,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    from unigendet.kernels.qk_norm_rope import configure
    from unigendet.kernels.qk_norm_rope_backward import backward, backward_programs

    to_sequence, _, positions = maps
    n = first_stream("qkv", qkv, lengths)
    results = allocate_gradients(qkv, norms, output_mask)
    dqkv, *dnorms = (r if m else None for r, m in zip(results, output_mask, strict=True))
    config = configure(capability(qkv) or (9, 0), heads, dq.shape[2], "backward")
    partials = None
    if any(output_mask[1:]):
        programs = backward_programs(config, qkv.shape[0], n, heads)[1]
        partials = torch.empty((programs, 2, dq.shape[2]), dtype=torch.float32, device=qkv.device)
    inputs = (unit_stride(qkv), _weights(norms), unit_stride(cos), unit_stride(sin), to_sequence, positions)
    gradients = [unit_stride(x) for x in (dq, dk, dv)]
    run_launches(backward(config, gradients, *inputs, dqkv, dnorms, partials, n, heads, eps), qkv)
    return results


def _cpp(
    qkv: Tensor,
    norms: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    maps: Sequence[Tensor],
    lengths: Tensor,
    heads: Sequence[int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    n = first_stream("qkv", qkv, lengths)
    outputs = allocate(qkv, heads)
    rows_extension.qk_norm_rope(qkv, norms, cos, sin, maps, n, heads, eps, outputs)
    return outputs


def _cpp_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    norms: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    maps: Sequence[Tensor],
    lengths: Tensor,
    heads: Sequence[int],
    eps: float,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    n = first_stream("qkv", qkv, lengths)
    results = allocate_gradients(qkv, norms, output_mask)
    inputs = (qkv, norms, cos, sin, maps, n, heads, eps)
    rows_extension.qk_norm_rope_backward((dq, dk, dv), *inputs, output_mask, results)
    return results


def _weights(norms: Sequence[Tensor]) -> list[Tensor]:
    """The norm weights, contiguous and of one dtype, since a kernel chooses among them."""
    dtype = reduce(torch.promote_types, (w.dtype for w in norms))
    return [w.to(dtype).contiguous() for w in norms]


def _copying(forward: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Callable[..., Tensor]:
    """``forward``, with its k and v copied into the rows ``key_rows`` of a cache."""

    def into(*arguments: Any) -> Tensor:
        *inputs, key_rows, cache = arguments
        q, *new = forward(*inputs)
        for rows, x in zip(cache, new, strict=True):
            rows.index_copy_(0, key_rows, x)
        return q

    return into


_FORWARD = {"reference": _reference, "torch": qk_norm_rope_torch.forward, "triton": _triton, "cpp": _cpp}
_FORWARD_INTO = {
    "reference": _copying(_reference),
    "torch": _copying(qk_norm_rope_torch.forward),
    "triton": _triton_into,
    "cpp": _copying(_cpp),
}
_BACKWARD = {
    "reference": _reference_backward,
    "torch": qk_norm_rope_torch.backward,
    "triton": _triton_backward,
    "cpp": _cpp_backward,
}


@torch.library.custom_op("unigendet::qk_norm_rope", mutates_args=())
def _qk_norm_rope(
    qkv: Tensor,
    q_und: Tensor,
    q_gen: Tensor,
    k_und: Tensor,
    k_gen: Tensor,
    cos: Tensor,
    sin: Tensor,
    to_sequence: Tensor,
    to_stream: Tensor,
    positions: Tensor,
    stream_lengths: Tensor,
    heads: Sequence[int],
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    norms, maps = (q_und, q_gen, k_und, k_gen), (to_sequence, to_stream, positions)
    return run(_FORWARD, backend, qkv, norms, cos, sin, maps, stream_lengths, heads, eps)


@_qk_norm_rope.register_fake
def _(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return allocate(qkv, rest[-3])


@torch.library.custom_op("unigendet::qk_norm_rope_backward", mutates_args=())
def _qk_norm_rope_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    q_und: Tensor,
    q_gen: Tensor,
    k_und: Tensor,
    k_gen: Tensor,
    cos: Tensor,
    sin: Tensor,
    to_sequence: Tensor,
    to_stream: Tensor,
    positions: Tensor,
    stream_lengths: Tensor,
    heads: Sequence[int],
    eps: float,
    output_mask: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    norms, maps = (q_und, q_gen, k_und, k_gen), (to_sequence, to_stream, positions)
    return run(_BACKWARD, backend, dq, dk, dv, qkv, norms, cos, sin, maps, stream_lengths, heads, eps, output_mask)


@_qk_norm_rope_backward.register_fake
def _(dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return allocate_gradients(qkv, rest[:4], rest[-2])


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.heads, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
    output_mask = list(ctx.needs_input_grad[:5])
    gradients = _qk_norm_rope_backward(dq, dk, dv, *ctx.saved_tensors, ctx.heads, ctx.eps, output_mask, ctx.backend)
    return *(g if m else None for g, m in zip(gradients, output_mask, strict=True)), *(None,) * 9


_qk_norm_rope.register_autograd(_autograd, setup_context=_setup_context)


@torch.library.custom_op("unigendet::qk_norm_rope_into", mutates_args=("k_cache", "v_cache"))
def _qk_norm_rope_into(
    qkv: Tensor,
    q_und: Tensor,
    q_gen: Tensor,
    k_und: Tensor,
    k_gen: Tensor,
    cos: Tensor,
    sin: Tensor,
    to_sequence: Tensor,
    to_stream: Tensor,
    positions: Tensor,
    stream_lengths: Tensor,
    key_rows: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    heads: Sequence[int],
    eps: float,
    backend: str,
) -> Tensor:
    norms, maps = (q_und, q_gen, k_und, k_gen), (to_sequence, to_stream, positions)
    cache = (k_cache, v_cache)
    return run(_FORWARD_INTO, backend, qkv, norms, cos, sin, maps, stream_lengths, heads, eps, key_rows, cache)


@_qk_norm_rope_into.register_fake
def _(qkv: Tensor, *rest: Any) -> Tensor:
    return allocate(qkv, rest[-3])[0]


def qk_norm_rope(
    qkv: Tensor,
    q_norms: tuple[Tensor, Tensor],
    k_norms: tuple[Tensor, Tensor],
    cos: Tensor,
    sin: Tensor,
    layout: Layout,
    *,
    num_heads: int,
    num_kv_heads: int,
    eps: float = 1e-6,
    cache: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-head RMSNorm of q and k, RoPE, and the move from stream-major to sequence order (paper section 3.2).

    Args:
        qkv: [T, (num_heads + 2 num_kv_heads) D], stream-major; a row holds the q heads, the k heads, the v heads.
        q_norms: (understanding, generation) norm weights of q, each [D].
        k_norms: the same for k.
        cos: [positions, D/2], see ``rope_table``; every position of the layout must be a row.
        sin: [positions, D/2].
        layout: orders, positions and, with a cache, destination rows.
        num_heads: Hq.
        num_kv_heads: Hkv.
        eps: added to the mean square.
        cache: None, or (k, v), each [K, num_kv_heads, D] with K the layout's number of keys, in qkv's dtype: the new
            rows are written into them in place. Inference only: no gradient flows through a cache.
        backend: "auto", "reference", "torch", "triton" or "cpp" (on CPUs).

    Returns:
        q [T, Hq, D], k and v in qkv's dtype: k and v are [T, Hkv, D] in sequence order, or the two tensors of
        ``cache``.

    Raises:
        ValueError: a shape, dtype or device does not fit, or gradients are asked for with a cache.
    """
    total = num_heads + 2 * num_kv_heads
    check_floating("qkv", qkv, ("T", "(num_heads + 2 num_kv_heads) D"))
    if qkv.shape[1] % (2 * total):
        reject("qkv", qkv, f"as wide as {total} heads (num_heads + 2 num_kv_heads) of an even head_dim")
    head_dim = qkv.shape[1] // total
    norms = (*q_norms, *k_norms)
    for name, weight in zip(("q_norms[0]", "q_norms[1]", "k_norms[0]", "k_norms[1]"), norms, strict=True):
        check_floating(name, weight, (head_dim,))
    check_floating("cos", cos, ("positions", head_dim // 2))
    check_floating("sin", sin, tuple(cos.shape))
    if qkv.shape[0] != layout.positions.shape[0]:
        reject("qkv", qkv, f"{layout.positions.shape[0]} rows long, one per query of the layout")
    check_stream_lengths(layout.stream_lengths)
    if not torch.compiler.is_compiling() and layout.max_position >= cos.shape[0]:  # a plain int would fix the graph
        reject(
            "cos",
            cos,
            f"at least {layout.max_position + 1} rows long: the layout's positions reach {layout.max_position}",
        )
    heads = [num_heads, num_kv_heads]
    chosen = resolve("qk_norm_rope", backend, qkv, *norms, cos, sin, layout.positions, *(cache or ()))
    maps = (layout.stream_to_sequence, layout.sequence_to_stream, layout.positions, layout.stream_lengths)
    if cache is None:
        if layout.query_begin.shape[0] != qkv.shape[0]:
            raise ValueError(
                "cache is None; it must be (k, v), "
                f"since the layout has {layout.query_begin.shape[0]} keys for {qkv.shape[0]} queries"
            )
        return _qk_norm_rope(qkv, *norms, cos, sin, *maps, heads, eps, chosen)
    for name, x in (("cache[0]", cache[0]), ("cache[1]", cache[1])):
        check_floating(name, x, (layout.query_begin.shape[0], num_kv_heads, head_dim), qkv.dtype)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (qkv, *norms)):
        raise ValueError(
            "cache is given; it must be None when gradients are recorded (use torch.no_grad for cached inference)"
        )
    return _qk_norm_rope_into(qkv, *norms, cos, sin, *maps, layout.key_rows, *cache, heads, eps, chosen), *cache
