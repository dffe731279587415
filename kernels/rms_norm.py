"""Residual add and RMSNorm with a norm weight per stream, and its backward pass.

Rows are cut into chunks of one stream each: the understanding rows come first, so programs know their stream by their
number. Shapes in comments: R rows of a tile, C its columns, the D columns of a row padded to a power of two.

The forward pass rounds where the Qwen2 decoder does: the sum, s · rstd, and that times the rounded weight. The backward
pass computes in float32 and rounds once. Norm weights get one row of partial sums per program, which a second kernel
adds in an order that depends on the sizes alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl

from .launch import Launch
from .primitives import rounded


@triton.jit
def _rows_of_program(program, understanding, total, rows):
    """[begin, end) of the ``rows`` rows of a program, which are of one stream, and whether that is generation."""
    understanding_programs = tl.cdiv(understanding, rows)
    is_generation = program >= understanding_programs
    begin = tl.where(is_generation, understanding + (program - understanding_programs) * rows, program * rows)
    end = tl.minimum(begin + rows, tl.where(is_generation, total, understanding))
    return begin, end, is_generation


@triton.jit(do_not_specialize=["understanding", "total"])
def rms_norm_forward(
    x_ptr,
    residual_ptr,
    und_ptr,
    gen_ptr,
    summed_ptr,
    rstd_ptr,
    normed_ptr,
    understanding,
    total,
    eps,
    STRIDE_X: tl.constexpr,
    STRIDE_RESIDUAL: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """R rows: s = x + r, rstd = 1 / sqrt(mean(s²) + eps), y = w · (s · rstd).

    Without ``residual_ptr``, s is x and is not written.
    """
    dtype: tl.constexpr = normed_ptr.dtype.element_ty
    begin, end, is_generation = _rows_of_program(tl.program_id(0), understanding, total, ROWS)
    rows = begin.to(tl.int64) + tl.arange(0, ROWS)  # [R]
    columns = tl.arange(0, COLUMNS)[None, :]  # [1, C]
    in_row = columns < D
    mask = (rows < end)[:, None] & in_row  # [R, C]
    out = rows[:, None] * D + columns

    s = tl.load(x_ptr + rows[:, None] * STRIDE_X + columns, mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + rows[:, None] * STRIDE_RESIDUAL + columns, mask, other=0.0)
        summed = rounded(s + residual.to(tl.float32), dtype)
        tl.store(summed_ptr + out, summed, mask)
        s = summed.to(tl.float32)
    weight = tl.load(tl.where(is_generation, gen_ptr, und_ptr) + columns, in_row, other=0.0).to(tl.float32)  # [1, C]
    rstd = tl.rsqrt(tl.sum(s * s, 1) / D + eps)  # [R]
    tl.store(rstd_ptr + rows, rstd, rows < end)
    h = rounded(s * rstd[:, None], dtype).to(tl.float32)
    tl.store(normed_ptr + out, rounded(h * rounded(weight, dtype).to(tl.float32), dtype), mask)


@triton.jit(do_not_specialize=["understanding", "total", "chunk"])
def rms_norm_backward(
    dy_ptr,
    dsummed_ptr,
    summed_ptr,
    rstd_ptr,
    und_ptr,
    gen_ptr,
    ds_ptr,
    partials_ptr,
    understanding,
    total,
    chunk,
    STRIDE_DY: tl.constexpr,
    STRIDE_DSUMMED: tl.constexpr,
    STRIDE_SUMMED: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    UNDERSTANDING: tl.constexpr,
    GENERATION: tl.constexpr,
):
    """``chunk`` rows of one stream: ds = dsummed + rstd (g − h · mean(g · h)), and their sum of dy · h.

    g = w · dy, h = s · rstd. Without ``ds_ptr`` there is no ds, and without UNDERSTANDING or GENERATION no sums for
    that stream, [programs, D]; rows that then serve nothing are not read. Without ``dsummed_ptr``, dsummed is 0.
    """
    program = tl.program_id(0)
    begin, end, is_generation = _rows_of_program(program, understanding, total, chunk)
    is_summed = tl.where(is_generation, GENERATION, UNDERSTANDING)
    if ds_ptr is None:
        end = tl.where(is_summed, end, begin)
    columns = tl.arange(0, COLUMNS)[None, :]  # [1, C]
    in_row = columns < D
    if ds_ptr is not None:
        weight = tl.load(tl.where(is_generation, gen_ptr, und_ptr) + columns, in_row, other=0.0).to(tl.float32)
    dw = tl.zeros([ROWS, COLUMNS], tl.float32)

    for first in tl.range(begin, end, ROWS, num_stages=STAGES):
        rows = first + tl.arange(0, ROWS).to(tl.int64)  # [R]
        mask = (rows < end)[:, None] & in_row  # [R, C]
        s = tl.load(summed_ptr + rows[:, None] * STRIDE_SUMMED + columns, mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + rows[:, None] * STRIDE_DY + columns, mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, rows < end, other=0.0)[:, None]  # [R, 1]
        h = s * rstd
        dw += dy * h
        if ds_ptr is not None:
            g = weight * dy
            mean = tl.sum(g * h, 1)[:, None] / D
            ds = rstd * (g - h * mean)
            if dsummed_ptr is not None:
                dsummed = tl.load(dsummed_ptr + rows[:, None] * STRIDE_DSUMMED + columns, mask, other=0.0)
                ds += dsummed.to(tl.float32)
            tl.store(ds_ptr + rows[:, None] * D + columns, rounded(ds, ds_ptr.dtype.element_ty), mask)

    if UNDERSTANDING or GENERATION:
        sums = partials_ptr + program.to(tl.int64) * D + columns
        tl.store(sums, tl.sum(dw, 0)[None, :], in_row & is_summed)


@triton.jit(do_not_specialize=["understanding", "total"])
def rms_norm_weight_gradients(
    partials_ptr,
    und_ptr,
    gen_ptr,
    understanding,
    total,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """C columns of one weight's gradient, the sum of its stream's rows of ``partials_ptr`` [programs, D].

    The first ``understanding`` of ``total`` programs are of the understanding stream. A gradient that is None is left
    out.
    """
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)  # [C]
    if tl.program_id(1) == 0:
        _sum_partials(partials_ptr, und_ptr, 0, understanding, columns, D, ROWS)
    else:
        _sum_partials(partials_ptr, gen_ptr, understanding, total, columns, D, ROWS)


@triton.jit
def _sum_partials(partials_ptr, out_ptr, begin, end, columns, D: tl.constexpr, ROWS: tl.constexpr):
    """Sum rows begin … end, in an order that depends on their number alone."""
    if out_ptr is not None:
        rows = tl.arange(0, ROWS)[:, None]
        sums = tl.zeros([ROWS, columns.shape[0]], tl.float32)
        for first in range(begin, end, ROWS):
            pointers = partials_ptr + (first + rows).to(tl.int64) * D + columns
            sums += tl.load(pointers, (first + rows < end) & (columns < D)[None, :], other=0.0)  # [R, C]
        tl.store(out_ptr + columns, rounded(tl.sum(sums, 0), out_ptr.dtype.element_ty), columns < D)


def _tile(columns: int) -> dict[str, int]:
    """The constants of a tile: as many rows as make it 4096 numbers, at least one."""
    width = triton.next_power_of_2(columns)
    return {"D": columns, "ROWS": max(1, 4096 // width), "COLUMNS": width}


def forward(
    x: Any,
    residual: Any | None,
    weights: Sequence[Any],
    summed: Any | None,
    rstd: Any,
    normed: Any,
    understanding: int,
    eps: float,
) -> tuple[Launch, ...]:
    """The launches that fill ``summed`` (None without a residual), ``rstd`` and ``normed``.

    ``weights`` are of one dtype. Rows of x and residual may have any stride; the last dimensions are contiguous.
    """
    total, columns = x.shape
    tile = _tile(columns)
    arguments = {"x_ptr": x, "residual_ptr": residual, "und_ptr": weights[0], "gen_ptr": weights[1]}
    arguments |= {"summed_ptr": summed, "rstd_ptr": rstd, "normed_ptr": normed, "understanding": understanding}
    arguments |= {"total": total, "eps": eps, "STRIDE_X": x.stride(0)}
    arguments |= {"STRIDE_RESIDUAL": 0 if residual is None else residual.stride(0)} | tile
    programs = triton.cdiv(understanding, tile["ROWS"]) + triton.cdiv(total - understanding, tile["ROWS"])
    num_warps = tile["ROWS"] * tile["COLUMNS"] // 1024  # 32 numbers per thread
    return (Launch(rms_norm_forward, (programs,), arguments, num_warps, 1),)


def backward_programs(rows: int, understanding: int, columns: int) -> tuple[int, int, int]:
    """Rows of a program, programs of the understanding stream, programs of both.

    A program's sums are as long as a row and in float32. 16 rows and more keep their part of the traffic below a
    sixteenth; more than 64 would leave multiprocessors idle.
    """
    chunk = max(min(max(rows // 1024, 16), 64), _tile(columns)["ROWS"])
    first = triton.cdiv(understanding, chunk)
    return chunk, first, first + triton.cdiv(rows - understanding, chunk)


def backward(
    dy: Any,
    dsummed: Any | None,
    summed: Any,
    rstd: Any,
    weights: Sequence[Any],
    ds: Any | None,
    dweights: Sequence[Any | None],
    partials: Any | None,
    understanding: int,
) -> tuple[Launch, ...]:
    """The launches that fill ``ds`` and ``dweights``; what is None is left out.

    ``partials`` is float32 scratch of shape [programs, D], see ``backward_programs``, or None if both ``dweights`` are.
    ``weights`` are of one dtype. Rows of dy, dsummed and summed may have any stride; last dimensions are contiguous.
    """
    total, columns = summed.shape
    chunk, first, programs = backward_programs(total, understanding, columns)
    tile = _tile(columns)
    stages = _stages(tile, summed.element_size())
    arguments = {"dy_ptr": dy, "dsummed_ptr": dsummed, "summed_ptr": summed, "rstd_ptr": rstd}
    arguments |= {"und_ptr": weights[0], "gen_ptr": weights[1], "ds_ptr": ds, "partials_ptr": partials}
    arguments |= {"understanding": understanding, "total": total, "chunk": chunk, "STRIDE_DY": dy.stride(0)}
    arguments |= {"STRIDE_DSUMMED": 0 if dsummed is None else dsummed.stride(0), "STRIDE_SUMMED": summed.stride(0)}
    arguments |= {"UNDERSTANDING": dweights[0] is not None, "GENERATION": dweights[1] is not None}
    num_warps = tile["ROWS"] * tile["COLUMNS"] // 512  # 16 numbers of each tensor per thread
    launches = [Launch(rms_norm_backward, (programs,), arguments | tile | {"STAGES": stages}, num_warps, stages)]
    if partials is not None:
        arguments = {"partials_ptr": partials, "und_ptr": dweights[0], "gen_ptr": dweights[1]}
        arguments |= {"understanding": first, "total": programs, "D": columns, "ROWS": 256, "COLUMNS": 16}
        launches.append(Launch(rms_norm_weight_gradients, (triton.cdiv(columns, 16), 2), arguments, 8, 1))
    return tuple(launches)


def _stages(tile: dict[str, int], itemsize: int) -> int:
    """Tiles in flight, the one computed included, each of up to three tensors: at most 96 KiB of shared memory wait."""
    size = tile["ROWS"] * tile["COLUMNS"] * itemsize
    return 3 if size <= 8192 else 2 if size <= 32768 else 1
