"""The ``cpp`` backend of the ops on stream-major rows: what ``unigendet._C`` needs around its kernels.

All fill outputs that they are given. They run with as many threads as PyTorch; results do not depend on their number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unigendet.ops._extension import plain, threads

# Shapes as in the ops' files; ``n`` is the number of understanding rows, weights come as one float32 tensor each.


def _float32(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.to(torch.float32) for t in tensors])


def _table(x: Tensor) -> Tensor:
    return plain(x.to(torch.float32).contiguous())


def _copy_needed(sums: Tensor, gradients: Sequence[Tensor], needed: Sequence[bool]) -> None:
    """Copy the rows of ``sums`` into those of ``gradients`` that are needed."""
    for row, gradient, is_needed in zip(sums, gradients, needed, strict=True):
        if is_needed:
            gradient.copy_(row)


def qk_norm_rope(
    qkv: Tensor,
    norms: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    maps: Sequence[Tensor],
    n: int,
    heads: Sequence[int],
    eps: float,
    outputs: Sequence[Tensor],
) -> None:
    """Fill q, k and v; see ``qk_norm_rope``."""
    from unigendet import _C

    _, to_stream, positions = (plain(x) for x in maps)
    q, k, v = outputs
    _C.qk_norm_rope_cpu(
        qkv=plain(qkv), weights=_float32(norms), cos=_table(cos), sin=_table(sin), to_stream=to_stream,
        positions=positions, heads=tuple(heads), understanding=n, eps=eps, q=q, k=k, v=v, num_threads=threads(),
    )  # fmt: skip


def qk_norm_rope_backward(
    gradients: Sequence[Tensor],
    qkv: Tensor,
    norms: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    maps: Sequence[Tensor],
    n: int,
    heads: Sequence[int],
    eps: float,
    output_mask: Sequence[bool],
    results: Sequence[Tensor],
) -> None:
    """Fill dqkv and the four weights' gradients, those that ``output_mask`` wants; ``gradients`` are dq, dk, dv."""
    from unigendet import _C

    to_sequence, _, positions = (plain(x) for x in maps)
    dq, dk, dv = (plain(x) for x in gradients)
    weights = _float32(norms)
    sums = torch.empty_like(weights)
    needs = tuple(output_mask[1 + stream] or output_mask[3 + stream] for stream in range(2))
    _C.qk_norm_rope_backward_cpu(
        dq=dq, dk=dk, dv=dv, qkv=plain(qkv), weights=weights, cos=_table(cos), sin=_table(sin),
        to_sequence=to_sequence, positions=positions, heads=tuple(heads), understanding=n, eps=eps,
        dqkv=results[0] if output_mask[0] else None, dweights=sums, needs_weights=needs, num_threads=threads(),
    )  # fmt: skip
    _copy_needed(sums, results[1:], output_mask[1:])


def rms_norm(
    x: Tensor, residual: Tensor | None, weights: Sequence[Tensor], n: int, eps: float, outputs: Sequence[Tensor]
) -> None:
    """Fill normed, summed (with a residual) and rstd."""
    from unigendet import _C

    normed, summed, rstd = outputs
    _C.rms_norm_cpu(
        x=plain(x), residual=None if residual is None else plain(residual),
        weights=_float32([w.to(x.dtype) for w in weights]), normed=normed, summed=summed, rstd=rstd, understanding=n,
        eps=eps, num_threads=threads(),
    )  # fmt: skip


def rms_norm_backward(
    dy: Tensor,
    dsummed: Tensor | None,
    summed: Tensor,
    rstd: Tensor,
    weights: Sequence[Tensor],
    n: int,
    output_mask: Sequence[bool],
    gradients: Sequence[Tensor],
) -> None:
    """Fill ds and the two weights' gradients, those that ``output_mask`` wants."""
    from unigendet import _C

    wide = _float32(weights)
    sums = torch.empty_like(wide)
    _C.rms_norm_backward_cpu(
        dy=plain(dy), dsummed=None if dsummed is None else plain(dsummed), summed=plain(summed), rstd=plain(rstd),
        weights=wide, ds=gradients[0] if output_mask[0] else None, dweights=sums,
        needs_weights=tuple(output_mask[1:]), understanding=n, num_threads=threads(),
    )  # fmt: skip
    _copy_needed(sums, gradients[1:], output_mask[1:])


def swiglu(gate_up: Tensor, out: Tensor) -> None:
    """Fill ``out`` with silu(gate) · up."""
    from unigendet import _C

    _C.swiglu_cpu(gate_up=plain(gate_up), out=out, num_threads=threads())


def swiglu_backward(dy: Tensor, gate_up: Tensor, gradient: Tensor) -> None:
    """Fill ``gradient``, that of ``gate_up``."""
    from unigendet import _C

    _C.swiglu_backward_cpu(dy=plain(dy), gate_up=plain(gate_up), gradient=gradient, num_threads=threads())
