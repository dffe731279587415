"""The ``cpp`` backend of ``symbiotic_attention``: what ``unigendet._C`` needs around its kernels, on the CPU.

All products and sums are float32, whatever the dtype. It runs with as many threads as PyTorch; results do not depend on
their number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unigendet.ops._extension import plain, threads
from unigendet.ops._launching import empty_contiguous


def _mask(query_begin: Tensor, query_end: Tensor, splits: Tensor, out_rows: Tensor | None) -> dict[str, Tensor | None]:
    rows = None if out_rows is None else plain(out_rows)
    return {
        "query_begin": plain(query_begin),
        "query_end": plain(query_end),
        "splits": plain(splits),
        "out_rows": rows,
    }


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_begin: Tensor,
    query_end: Tensor,
    splits: Tensor,
    out_rows: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [T, Hq, D], row t at out_rows[t], and lse [Hq, T] in sequence order. See ``symbiotic_attention``."""
    from unigendet import _C

    out = empty_contiguous(q)
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    _C.attention_cpu(
        q=plain(q), k=plain(k), v=plain(v), **_mask(query_begin, query_end, splits, out_rows), scale=scale,
        out=out, lse=lse, num_threads=threads(),
    )  # fmt: skip
    return out, lse


def backward(
    grad_out: Tensor,
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
    _: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v in sequence order; ``grad_out`` and ``out`` have their rows at out_rows."""
    from unigendet import _C

    dq, dk, dv = empty_contiguous(q), empty_contiguous(k), empty_contiguous(v)
    _C.attention_backward_cpu(
        dout=plain(grad_out), dlse=None if grad_lse is None else plain(grad_lse.contiguous()), q=plain(q), k=plain(k),
        v=plain(v), out=plain(out), lse=plain(lse.contiguous()),
        **_mask(query_begin, query_end, splits, out_rows), scale=scale, dq=dq, dk=dk, dv=dv, num_threads=threads(),
    )  # fmt: skip
    return dq, dk, dv
