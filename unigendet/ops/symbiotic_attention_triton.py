"""The ``triton`` backend of ``symbiotic_attention``: memory, schedules and launches for the kernels.

Forward is one kernel, which also stores the output stream-major. Backward is a pass for delta, which also brings the
gradient into sequence order, then dk and dv over the transposed schedule and dq over the forward one. Instead of the
last, dk and dv's kernel can add to dq atomically: fewer operations, but the sum's order, and with it the last bits,
differ from run to run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unigendet.ops._launching import capability, empty_contiguous, run_launches, unit_stride
from unigendet.schedule import TileSchedule, tile_schedule

if TYPE_CHECKING:
    from unigendet.kernels.config import AttentionConfig


def _configure(
    q: Tensor, k: Tensor, splits: Tensor, direction: str, *tiled: Tensor
) -> tuple[AttentionConfig, TileSchedule]:
    """Configuration and schedule of a kernel that loads tiles of the tensors ``tiled``."""
    from unigendet.kernels import config as configs
    from unigendet.kernels.launch import describable, dtype_name

    config = configs.attention_config(
        capability(q), q.shape[2], dtype_name(q), direction, describable=describable(*tiled)
    )
    return config, tile_schedule(splits, k.shape[0], config.block_m, config.block_n, q.device)


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
    from unigendet.kernels.attention_forward import attention_forward

    q, k, v = (unit_stride(x) for x in (q, k, v))
    out = empty_contiguous(q)
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)
    config, schedule = _configure(q, k, splits, "forward", k, v)
    run_launches(attention_forward(q, k, v, out, lse, query_begin, query_end, schedule, out_rows, scale, config), q)
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
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v in sequence order; ``grad_out`` and ``out`` have their rows at out_rows."""
    from unigendet.kernels.attention_delta import attention_delta, scaled_copy
    from unigendet.kernels.attention_dkdv import attention_dkdv
    from unigendet.kernels.attention_dq import attention_dq

    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    q, k, v, out, grad_out = (unit_stride(x) for x in (q, k, v, out, grad_out))
    lse = lse.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    delta = torch.empty_like(lse)
    in_sequence = grad_out if out_rows is None else empty_contiguous(grad_out)
    copy = None if out_rows is None else in_sequence
    run_launches(attention_delta(out, grad_out, grad_lse, delta, copy, out_rows), q)

    dq, dk, dv = empty_contiguous(q), empty_contiguous(k), empty_contiguous(v)
    inputs, mask = (q, k, v, in_sequence, lse, delta), (query_begin, query_end)
    dq_sum = None if deterministic else torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    direction = "backward_dkdv" if deterministic else "backward_dkdv_atomic"
    config, schedule = _configure(q, k, splits, direction, q, in_sequence)
    run_launches(attention_dkdv(*inputs, dk, dv, dq_sum, *mask, schedule, scale, config), q)
    if dq_sum is None:
        config, schedule = _configure(q, k, splits, "backward_dq", k, v)
        run_launches(attention_dq(*inputs, dq, *mask, schedule, scale, config), q)
    else:
        run_launches(scaled_copy(dq_sum, dq, scale), q)
    return dq, dk, dv
