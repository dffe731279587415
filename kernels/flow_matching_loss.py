"""The mean squared error of every row, over K features, and its backward pass.

A program computes R rows of K columns, padded to a power of two, C. Arithmetic is in float32 and rounded once.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .launch import Launch
from .primitives import rounded


@triton.jit
def _difference(
    prediction_ptr,
    target_ptr,
    total,
    STRIDE_PREDICTION: tl.constexpr,
    STRIDE_TARGET: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Rows of a program, int64 [R], columns [1, C], which of their numbers exist, and prediction − target [R, C]."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)[None, :]
    mask = (rows < total)[:, None] & (columns < K)
    prediction = tl.load(prediction_ptr + rows[:, None] * STRIDE_PREDICTION + columns, mask, other=0.0)
    target = tl.load(target_ptr + rows[:, None] * STRIDE_TARGET + columns, mask, other=0.0)
    return rows, columns, mask, prediction.to(tl.float32) - target.to(tl.float32)


@triton.jit(do_not_specialize=["total"])
def flow_matching_loss_forward(
    prediction_ptr,
    target_ptr,
    loss_ptr,
    total,
    STRIDE_PREDICTION: tl.constexpr,
    STRIDE_TARGET: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """loss = (1/K) Σ (prediction − target)²."""
    rows, _, _, difference = _difference(
        prediction_ptr, target_ptr, total, STRIDE_PREDICTION, STRIDE_TARGET, K, ROWS, COLUMNS
    )
    tl.store(loss_ptr + rows, tl.sum(difference * difference, 1) / K, rows < total)


@triton.jit(do_not_specialize=["total"])
def flow_matching_loss_backward(
    dloss_ptr,
    prediction_ptr,
    target_ptr,
    dprediction_ptr,
    dtarget_ptr,
    total,
    STRIDE_DLOSS: tl.constexpr,
    STRIDE_PREDICTION: tl.constexpr,
    STRIDE_TARGET: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dprediction = (2/K) (prediction − target) dloss = −dtarget. A result whose pointer is None is left out."""
    rows, columns, mask, difference = _difference(
        prediction_ptr, target_ptr, total, STRIDE_PREDICTION, STRIDE_TARGET, K, ROWS, COLUMNS
    )
    dloss = tl.load(dloss_ptr + rows * STRIDE_DLOSS, rows < total, other=0.0)[:, None]
    gradient = difference * (dloss * (2 / K))
    out = rows[:, None] * K + columns
    if dprediction_ptr is not None:
        tl.store(dprediction_ptr + out, rounded(gradient, dprediction_ptr.dtype.element_ty), mask)
    if dtarget_ptr is not None:
        tl.store(dtarget_ptr + out, rounded(-gradient, dtarget_ptr.dtype.element_ty), mask)


def _rows(prediction: Any, target: Any) -> tuple[tuple[int], dict[str, Any], int]:
    """Grid, shared arguments and warps: tiles of 4096 numbers or one row, 32 numbers of each tensor per thread."""
    total, features = prediction.shape
    columns = triton.next_power_of_2(features)
    rows = max(1, 4096 // columns)
    arguments = {"prediction_ptr": prediction, "target_ptr": target, "total": total}
    arguments |= {"STRIDE_PREDICTION": prediction.stride(0), "STRIDE_TARGET": target.stride(0)}
    arguments |= {"K": features, "ROWS": rows, "COLUMNS": columns}
    return (triton.cdiv(total, rows),), arguments, rows * columns // 1024


def forward(prediction: Any, target: Any, loss: Any) -> tuple[Launch, ...]:
    """The launch that fills ``loss`` [M]. Rows of prediction and target [M, K] may have any stride."""
    grid, arguments, num_warps = _rows(prediction, target)
    return (Launch(flow_matching_loss_forward, grid, arguments | {"loss_ptr": loss}, num_warps, 1),)


def backward(
    dloss: Any, prediction: Any, target: Any, dprediction: Any | None, dtarget: Any | None
) -> tuple[Launch, ...]:
    """The launch that fills ``dprediction`` and ``dtarget``; what is None is left out. dloss may have any stride."""
    grid, arguments, num_warps = _rows(prediction, target)
    arguments |= {"dloss_ptr": dloss, "dprediction_ptr": dprediction, "dtarget_ptr": dtarget}
    arguments |= {"STRIDE_DLOSS": dloss.stride(0)}
    return (Launch(flow_matching_loss_backward, grid, arguments, num_warps, 1),)
