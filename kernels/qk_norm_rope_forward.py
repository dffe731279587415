"""qk_norm_rope, forward: a program computes one group of heads of one row. See ``qk_norm_rope`` for the shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl

from .launch import Launch
from .qk_norm_rope import (
    Config,
    head_constants,
    head_pointers,
    input_arguments,
    inverse_rms,
    load,
    store,
    strides,
)


@triton.jit(do_not_specialize=["understanding"])
def qk_norm_rope_forward(
    qkv_ptr,
    q_und_ptr,
    q_gen_ptr,
    k_und_ptr,
    k_gen_ptr,
    cos_ptr,
    sin_ptr,
    to_sequence_ptr,
    positions_ptr,
    key_rows_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    stride_qkv,
    stride_cos,
    stride_sin,
    stride_q_row,
    stride_q_head,
    stride_k_row,
    stride_k_head,
    stride_v_row,
    stride_v_head,
    understanding,
    eps,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    V_HEADS: tl.constexpr,
    V_TILE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """One group of one row: y1 = n1 cos − n2 sin, y2 = n2 cos + n1 sin, n = w · x / sqrt(mean(x²) + eps).

    Row ``row`` of qkv goes to row t = to_sequence[row] of q, and of k and v to row key_rows[t], or t without key_rows.
    Rows from ``understanding`` on take the generation weights.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    row = (tl.program_id(0) // GROUPS).to(tl.int64)
    group = tl.program_id(0) % GROUPS
    t = tl.load(to_sequence_ptr + row)

    heads = group * TILE_HEADS + tl.arange(0, TILE_HEADS)  # [H]
    columns = tl.arange(0, COLUMNS)  # [C]
    in_half = columns[None, :] < HALF
    mask = (heads[:, None] < Q_HEADS + KV_HEADS) & in_half  # [H, C]
    x_ptrs = qkv_ptr + row * stride_qkv + heads[:, None] * HEAD_DIM + columns[None, :]
    x1 = load(x_ptrs, mask)
    x2 = load(x_ptrs + HALF, mask)

    v_local = tl.arange(0, V_TILE)[:, None]  # [V, 1]
    v_heads = group * V_HEADS + v_local
    v_columns = tl.arange(0, 2 * COLUMNS)[None, :]  # [1, D]
    v_mask = (v_local < V_HEADS) & (v_heads < KV_HEADS) & (v_columns < HEAD_DIM)
    v_source = qkv_ptr + row * stride_qkv + (Q_HEADS + KV_HEADS + v_heads) * HEAD_DIM + v_columns
    v = tl.load(v_source, v_mask, other=0.0)  # [V, D]

    position = tl.load(positions_ptr + t)
    if key_rows_ptr is None:
        key_row = t
    else:
        key_row = tl.load(key_rows_ptr + t)
    cos = load(cos_ptr + position * stride_cos + columns[None, :], in_half)  # [1, C]
    sin = load(sin_ptr + position * stride_sin + columns[None, :], in_half)
    is_generation = row >= understanding
    q_weight = tl.where(is_generation, q_gen_ptr, q_und_ptr)
    k_weight = tl.where(is_generation, k_gen_ptr, k_und_ptr)
    is_q = heads[:, None] < Q_HEADS
    w1 = tl.where(is_q, load(q_weight + columns[None, :], in_half), load(k_weight + columns[None, :], in_half))
    second = HALF + columns[None, :]
    w2 = tl.where(is_q, load(q_weight + second, in_half), load(k_weight + second, in_half))

    rstd = inverse_rms(x1, x2, eps, HEAD_DIM)
    n1 = w1 * (x1 * rstd)
    n2 = w2 * (x2 * rstd)
    y_ptrs = head_pointers(
        q_ptr, k_ptr, t, key_row, stride_q_row, stride_q_head, stride_k_row, stride_k_head, heads, Q_HEADS
    )
    y_ptrs = y_ptrs[:, None] + columns[None, :]
    store(y_ptrs, n1 * cos - n2 * sin, mask)
    store(y_ptrs + HALF, n2 * cos + n1 * sin, mask)
    tl.store(v_ptr + key_row * stride_v_row + v_heads.to(tl.int64) * stride_v_head + v_columns, v, v_mask)


def forward(
    config: Config,
    qkv: Any,
    norms: Sequence[Any],
    cos: Any,
    sin: Any,
    to_sequence: Any,
    positions: Any,
    key_rows: Any | None,
    outputs: Sequence[Any],
    understanding: int,
    heads: Sequence[int],
    eps: float,
) -> tuple[Launch, ...]:
    """The launches that fill q, k, v = ``outputs`` from the projection ``qkv``.

    ``norms`` are q's understanding and generation weights, then k's; ``heads`` is (Hq, Hkv). k and v may be caches, of
    which the rows ``key_rows`` are written. Rows and heads may have any strides; the last dimensions are contiguous.
    """
    q, k, v = outputs
    constants = head_constants(heads, q.shape[2], config)
    arguments = input_arguments(qkv, norms, cos, sin, to_sequence, positions) | strides(q=q, k=k, v=v) | constants
    arguments |= {"key_rows_ptr": key_rows, "q_ptr": q, "k_ptr": k, "v_ptr": v}
    arguments |= {"understanding": understanding, "eps": eps}
    grid = (qkv.shape[0] * constants["GROUPS"],)
    return (Launch(qk_norm_rope_forward, grid, arguments, config.num_warps, config.num_stages),)
