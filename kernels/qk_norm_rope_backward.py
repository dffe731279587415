"""qk_norm_rope, backward: a program goes through some rows of one stream. See ``qk_norm_rope`` for the shapes."""

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
    per_head,
    store,
    strides,
)


@triton.jit(do_not_specialize=["understanding", "total"])
def qk_norm_rope_backward(
    dq_ptr,
    dk_ptr,
    dv_ptr,
    qkv_ptr,
    q_und_ptr,
    q_gen_ptr,
    k_und_ptr,
    k_gen_ptr,
    cos_ptr,
    sin_ptr,
    to_sequence_ptr,
    positions_ptr,
    dqkv_ptr,
    partials_ptr,
    stride_dq_row,
    stride_dq_head,
    stride_dk_row,
    stride_dk_head,
    stride_dv_row,
    stride_dv_head,
    stride_qkv,
    stride_cos,
    stride_sin,
    understanding,
    total,
    eps,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    V_HEADS: tl.constexpr,
    V_TILE: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One group of ROWS rows of one stream: their part of dqkv, and their sum of dn · h for q and for k.

    dn1 = dy1 cos + dy2 sin, dn2 = dy2 cos − dy1 sin, g = w · dn, h = x · rstd, dx = rstd (g − h · mean(g · h)).
    Without ``dqkv_ptr`` or ``partials_ptr`` that result is left out. Partials are [programs, 2 (q, k), HEAD_DIM].
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    WIDTH: tl.constexpr = (Q_HEADS + 2 * KV_HEADS) * HEAD_DIM
    program = tl.program_id(0)
    group = program % GROUPS
    chunk = program // GROUPS
    understanding_chunks = (understanding + ROWS - 1) // ROWS
    is_generation = chunk >= understanding_chunks
    begin = tl.where(is_generation, understanding + (chunk - understanding_chunks) * ROWS, chunk * ROWS)
    end = tl.minimum(begin + ROWS, tl.where(is_generation, total, understanding))

    heads = group * TILE_HEADS + tl.arange(0, TILE_HEADS)  # [H]
    is_q = heads[:, None] < Q_HEADS
    columns = tl.arange(0, COLUMNS)  # [C]
    in_half = columns[None, :] < HALF
    mask = (heads[:, None] < Q_HEADS + KV_HEADS) & in_half  # [H, C]
    v_local = tl.arange(0, V_TILE)[:, None]  # [V, 1]
    v_heads = group * V_HEADS + v_local
    v_columns = tl.arange(0, 2 * COLUMNS)[None, :]  # [1, D]
    v_mask = (v_local < V_HEADS) & (v_heads < KV_HEADS) & (v_columns < HEAD_DIM)

    q_weight = tl.where(is_generation, q_gen_ptr, q_und_ptr)
    k_weight = tl.where(is_generation, k_gen_ptr, k_und_ptr)
    w1 = per_head(q_weight + columns[None, :], k_weight + columns[None, :], is_q, in_half)  # [H, C]
    w2 = per_head(q_weight + HALF + columns[None, :], k_weight + HALF + columns[None, :], is_q, in_half)
    dw1 = tl.zeros([TILE_HEADS, COLUMNS], tl.float32)
    dw2 = tl.zeros([TILE_HEADS, COLUMNS], tl.float32)

    for row in tl.range(begin.to(tl.int64), end.to(tl.int64), num_stages=STAGES):
        t = tl.load(to_sequence_ptr + row)
        x_ptrs = qkv_ptr + row * stride_qkv + heads[:, None] * HEAD_DIM + columns[None, :]
        x1 = load(x_ptrs, mask)
        x2 = load(x_ptrs + HALF, mask)
        dy_ptrs = head_pointers(
            dq_ptr, dk_ptr, t, t, stride_dq_row, stride_dq_head, stride_dk_row, stride_dk_head, heads, Q_HEADS
        )
        dy_ptrs = dy_ptrs[:, None] + columns[None, :]
        dy1 = load(dy_ptrs, mask)
        dy2 = load(dy_ptrs + HALF, mask)
        position = tl.load(positions_ptr + t)
        cos = load(cos_ptr + position * stride_cos + columns[None, :], in_half)  # [1, C]
        sin = load(sin_ptr + position * stride_sin + columns[None, :], in_half)

        rstd = inverse_rms(x1, x2, eps, HEAD_DIM)
        h1 = x1 * rstd
        h2 = x2 * rstd
        dn1 = dy1 * cos + dy2 * sin
        dn2 = dy2 * cos - dy1 * sin
        if partials_ptr is not None:
            dw1 += dn1 * h1
            dw2 += dn2 * h2
        if dqkv_ptr is not None:
            g1 = w1 * dn1
            g2 = w2 * dn2
            mean = tl.sum(g1 * h1 + g2 * h2, 1)[:, None] / HEAD_DIM
            dx_ptrs = dqkv_ptr + row * WIDTH + heads[:, None] * HEAD_DIM + columns[None, :]
            store(dx_ptrs, rstd * (g1 - h1 * mean), mask)
            store(dx_ptrs + HALF, rstd * (g2 - h2 * mean), mask)
            dv_ptrs = dv_ptr + t * stride_dv_row + v_heads.to(tl.int64) * stride_dv_head + v_columns
            dv = tl.load(dv_ptrs, v_mask, other=0.0)  # [V, D]
            v_ptrs = dqkv_ptr + row * WIDTH + (Q_HEADS + KV_HEADS + v_heads) * HEAD_DIM + v_columns
            tl.store(v_ptrs, dv, v_mask)

    if partials_ptr is not None:
        sums = partials_ptr + program.to(tl.int64) * (2 * HEAD_DIM) + columns
        tl.store(sums, tl.sum(tl.where(is_q, dw1, 0.0), 0), columns < HALF)
        tl.store(sums + HALF, tl.sum(tl.where(is_q, dw2, 0.0), 0), columns < HALF)
        tl.store(sums + HEAD_DIM, tl.sum(tl.where(is_q, 0.0, dw1), 0), columns < HALF)
        tl.store(sums + HEAD_DIM + HALF, tl.sum(tl.where(is_q, 0.0, dw2), 0), columns < HALF)


@triton.jit
def _sum_partials(
    partials_ptr,
    out_ptr,
    begin,
    end,
    columns,
    in_head,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    WEIGHT: tl.constexpr,
):
    """Sum rows begin … end of one of the two partials, in an order that depends on their number alone."""
    if out_ptr is not None:
        rows = tl.arange(0, ROWS)[:, None]
        sums = tl.zeros([ROWS, columns.shape[0]], tl.float32)
        for first in range(begin, end, ROWS):
            pointers = partials_ptr + (first + rows).to(tl.int64) * (2 * HEAD_DIM) + WEIGHT * HEAD_DIM + columns
            sums += tl.load(pointers, (first + rows < end) & in_head[None, :], other=0.0)  # [ROWS, C]
        store(out_ptr + columns, tl.sum(sums, 0), in_head)


@triton.jit(do_not_specialize=["understanding", "total"])
def qk_norm_rope_weight_gradients(
    partials_ptr,
    q_und_ptr,
    q_gen_ptr,
    k_und_ptr,
    k_gen_ptr,
    understanding,
    total,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Some columns of one norm weight's gradient: dw = Σ partials over its stream's programs, [programs, 2, D].

    The first ``understanding`` of ``total`` programs are of the understanding stream. A gradient that is None is left
    out.
    """
    weight = tl.program_id(1)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)  # [C]
    in_head = columns < HEAD_DIM
    if weight == 0:
        _sum_partials(partials_ptr, q_und_ptr, 0, understanding, columns, in_head, HEAD_DIM, ROWS, 0)
    elif weight == 1:
        _sum_partials(partials_ptr, q_gen_ptr, understanding, total, columns, in_head, HEAD_DIM, ROWS, 0)
    elif weight == 2:
        _sum_partials(partials_ptr, k_und_ptr, 0, understanding, columns, in_head, HEAD_DIM, ROWS, 1)
    else:
        _sum_partials(partials_ptr, k_gen_ptr, understanding, total, columns, in_head, HEAD_DIM, ROWS, 1)


def backward_programs(config: Config, rows: int, understanding: int, heads: Sequence[int]) -> tuple[int, int]:
    """Programs of the understanding stream, and of both streams. A program's rows are of one stream."""
    groups = triton.cdiv(sum(heads), config.tile_heads)
    first = triton.cdiv(understanding, config.rows)
    return first * groups, (first + triton.cdiv(rows - understanding, config.rows)) * groups


def backward(
    config: Config,
    gradients: Sequence[Any],
    qkv: Any,
    norms: Sequence[Any],
    cos: Any,
    sin: Any,
    to_sequence: Any,
    positions: Any,
    dqkv: Any | None,
    dnorms: Sequence[Any | None],
    partials: Any | None,
    understanding: int,
    heads: Sequence[int],
    eps: float,
) -> tuple[Launch, ...]:
    """The launches that fill ``dqkv`` and ``dnorms`` from (dq, dk, dv) = ``gradients``; what is None is left out.

    ``partials`` is float32 scratch of shape [programs, 2, D], see ``backward_programs``, or None if all ``dnorms`` are.
    Rows and heads of what is read may have any strides; ``dqkv`` is contiguous, and so are all last dimensions.
    """
    dq, dk, dv = gradients
    rows, head_dim = qkv.shape[0], dq.shape[2]
    first, programs = backward_programs(config, rows, understanding, heads)
    arguments = input_arguments(qkv, norms, cos, sin, to_sequence, positions) | strides(dq=dq, dk=dk, dv=dv)
    arguments |= {"dq_ptr": dq, "dk_ptr": dk, "dv_ptr": dv, "dqkv_ptr": dqkv, "partials_ptr": partials}
    arguments |= {"understanding": understanding, "total": rows, "eps": eps}
    arguments |= head_constants(heads, head_dim, config) | {"ROWS": config.rows, "STAGES": config.num_stages}
    launches = [Launch(qk_norm_rope_backward, (programs,), arguments, config.num_warps, config.num_stages)]
    if partials is not None:
        names = ("q_und_ptr", "q_gen_ptr", "k_und_ptr", "k_gen_ptr")
        arguments = dict(zip(names, dnorms, strict=True)) | {"partials_ptr": partials}
        arguments |= {"understanding": first, "total": programs, "HEAD_DIM": head_dim, "ROWS": 256, "COLUMNS": 8}
        launches.append(Launch(qk_norm_rope_weight_gradients, (triton.cdiv(head_dim, 8), 4), arguments, 4, 1))
    return tuple(launches)
