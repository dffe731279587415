"""Symbiotic attention, what surrounds the backward pass: one pass before it, and one after it with atomics.

Before: delta[h, t] = dO[t, h] · out[t, h] − dL[h, t], with dL the gradient of lse. The output and its gradient may be
stored stream-major; this pass reads them anyway, so it also writes the gradient in sequence order, from which the other
kernels load their tiles.

After: dq = scale · (what the programs of ``attention_dkdv`` added up in float32).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .launch import Launch, head_strides
from .primitives import rounded

if TYPE_CHECKING:
    from torch import Tensor

_ROWS = 32  # rows of a program: every row of a head is one contiguous piece, so more would only mean more registers
_COPIED = 4096  # numbers that a program of the copy takes


@triton.jit(do_not_specialize=["num_queries"])
def attention_delta_kernel(
    out_ptr, do_ptr, dlse_ptr, delta_ptr, do_sequence_ptr, out_rows_ptr, num_queries, stride_out_row,
    STRIDE_OUT_HEAD: tl.constexpr, stride_do_row, STRIDE_DO_HEAD: tl.constexpr, HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, HAS_DLSE: tl.constexpr, REORDER: tl.constexpr,
    COPY: tl.constexpr,
):  # fmt: skip
    """delta of some rows of one head. REORDER: row t of out and dO is out_rows[t]. COPY: also write dO's rows."""
    program = tl.program_id(0)
    head = program % HEADS
    t = (program // HEADS) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    is_query = t < num_queries
    rows = t.to(tl.int64)
    if REORDER:
        rows = tl.load(out_rows_ptr + t, is_query, other=0)
    columns = tl.arange(0, COLUMNS)
    mask = is_query[:, None] & (columns < HEAD_DIM)[None, :]
    wide_head = head.to(tl.int64)
    out = tl.load(out_ptr + rows[:, None] * stride_out_row + wide_head * STRIDE_OUT_HEAD + columns, mask, other=0.0)
    do = tl.load(do_ptr + rows[:, None] * stride_do_row + wide_head * STRIDE_DO_HEAD + columns, mask, other=0.0)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)  # [ROWS]
    per_head = wide_head * num_queries
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + per_head + t, is_query, other=0.0)
    tl.store(delta_ptr + per_head + t, delta, is_query)
    if COPY:
        tl.store(do_sequence_ptr + t.to(tl.int64)[:, None] * (HEADS * HEAD_DIM) + head * HEAD_DIM + columns, do, mask)


def attention_delta(
    out: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    delta: Tensor,
    grad_sequence: Tensor | None,
    out_rows: Tensor | None,
) -> tuple[Launch, ...]:
    """The launch that fills ``delta`` and, unless it is None, ``grad_sequence``.

    Args:
        out: [T, Hq, D], the output of the forward pass, unit stride in the last dimension, as its gradient.
        grad_out: [T, Hq, D].
        grad_lse: float32 [Hq, T], contiguous; None: lse was not used.
        delta: float32 [Hq, T], contiguous.
        grad_sequence: [T, Hq, D], contiguous: the gradient in sequence order.
        out_rows: int64 [T], the row of out and grad_out for each query row; None: the same.
    """
    queries, heads, head_dim = out.shape
    arguments = {
        "out_ptr": out,
        "do_ptr": grad_out,
        "dlse_ptr": grad_lse,
        "delta_ptr": delta,
        "do_sequence_ptr": grad_sequence,
        "out_rows_ptr": out_rows,
        "num_queries": queries,
        **head_strides(out=out, do=grad_out),
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "COLUMNS": triton.next_power_of_2(head_dim),
        "ROWS": _ROWS,
        "HAS_DLSE": grad_lse is not None,
        "REORDER": out_rows is not None,
        "COPY": grad_sequence is not None,
    }
    return (Launch(attention_delta_kernel, (triton.cdiv(queries, _ROWS) * heads,), arguments, 4, 1),)


@triton.jit(do_not_specialize=["rows"])
def scaled_copy_kernel(
    source_ptr, target_ptr, scale, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """target = scale · source, rounded to target's dtype, both [rows, WIDTH]: a tile of ROWS × COLUMNS."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    offsets = row[:, None] * WIDTH + column[None, :]
    mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
    x = tl.load(source_ptr + offsets, mask, other=0.0)
    tl.store(target_ptr + offsets, rounded(x * scale, target_ptr.dtype.element_ty), mask)


def scaled_copy(source: Tensor, target: Tensor, scale: float) -> tuple[Launch, ...]:
    """The launch for target = scale · source; float32 into any dtype, both [T, Hq, D], contiguous."""
    rows, width = source.shape[0], source.shape[1] * source.shape[2]
    columns = min(512, triton.next_power_of_2(width))
    tile = _COPIED // columns
    arguments = {"source_ptr": source, "target_ptr": target, "scale": scale, "rows": rows}
    arguments |= {"WIDTH": width, "ROWS": tile, "COLUMNS": columns}
    return (Launch(scaled_copy_kernel, (triton.cdiv(rows, tile), triton.cdiv(width, columns)), arguments, 8, 1),)
