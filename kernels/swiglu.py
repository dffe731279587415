"""SwiGLU, y = silu(g) · u, and its backward pass, over (gate | up) rows of 2·I numbers.

A program computes R rows of C columns of y. Arithmetic is in float32 and rounded once.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .launch import Launch
from .primitives import rounded


@triton.jit
def _tile(total, INTERMEDIATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows, int64 [R, 1], and columns [1, C] of a program's tile, and which of its numbers exist [R, C]."""
    BLOCKS: tl.constexpr = (INTERMEDIATE + COLUMNS - 1) // COLUMNS
    first = (tl.program_id(0) // BLOCKS).to(tl.int64) * ROWS
    rows = first + tl.arange(0, ROWS)[:, None]
    columns = tl.program_id(0) % BLOCKS * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return rows, columns, (rows < total) & (columns < INTERMEDIATE)


@triton.jit(do_not_specialize=["total"])
def swiglu_forward(
    gate_up_ptr,
    y_ptr,
    total,
    STRIDE_GATE_UP: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """y = g σ(g) u."""
    rows, columns, mask = _tile(total, INTERMEDIATE, ROWS, COLUMNS)
    gate_ptrs = gate_up_ptr + rows * STRIDE_GATE_UP + columns
    gate = tl.load(gate_ptrs, mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + INTERMEDIATE, mask, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + rows * INTERMEDIATE + columns, rounded(y, y_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["total"])
def swiglu_backward(
    dy_ptr,
    gate_up_ptr,
    gradient_ptr,
    total,
    STRIDE_DY: tl.constexpr,
    STRIDE_GATE_UP: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dg = dy u σ(g) (1 + g (1 − σ(g))) and du = dy g σ(g), into the halves of one row."""
    rows, columns, mask = _tile(total, INTERMEDIATE, ROWS, COLUMNS)
    gate_ptrs = gate_up_ptr + rows * STRIDE_GATE_UP + columns
    dy = tl.load(dy_ptr + rows * STRIDE_DY + columns, mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptrs, mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + INTERMEDIATE, mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dgate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
    dup = dy * gate * sigmoid
    dtype: tl.constexpr = gradient_ptr.dtype.element_ty
    out = gradient_ptr + rows * (2 * INTERMEDIATE) + columns
    tl.store(out, rounded(dgate, dtype), mask)
    tl.store(out + INTERMEDIATE, rounded(dup, dtype), mask)


def _tiles(total: int, intermediate: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid and the sizes: tiles of 2048 numbers, 16 of each tensor per thread of 4 warps.

    512 columns divide the width of BAGEL's MLP, 37 · 512.
    """
    columns = min(512, triton.next_power_of_2(max(1, intermediate)))
    rows = 2048 // columns
    sizes = {"total": total, "INTERMEDIATE": intermediate, "ROWS": rows, "COLUMNS": columns}
    return (triton.cdiv(total, rows) * triton.cdiv(intermediate, columns),), sizes


def forward(gate_up: Any, y: Any) -> tuple[Launch, ...]:
    """The launch that fills ``y`` [T, I] from ``gate_up`` [T, 2·I], whose rows may have any stride."""
    grid, sizes = _tiles(*y.shape)
    arguments = {"gate_up_ptr": gate_up, "y_ptr": y, "STRIDE_GATE_UP": gate_up.stride(0)} | sizes
    return (Launch(swiglu_forward, grid, arguments, num_warps=4, num_stages=1),)


def backward(dy: Any, gate_up: Any, gradient: Any) -> tuple[Launch, ...]:
    """The launch that fills ``gradient`` [T, 2·I]. Rows of ``dy`` and ``gate_up`` may have any stride."""
    grid, sizes = _tiles(*dy.shape)
    arguments = {"dy_ptr": dy, "gate_up_ptr": gate_up, "gradient_ptr": gradient}
    arguments |= {"STRIDE_DY": dy.stride(0), "STRIDE_GATE_UP": gate_up.stride(0)} | sizes
    return (Launch(swiglu_backward, grid, arguments, num_warps=4, num_stages=1),)
