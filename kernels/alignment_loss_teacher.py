"""The alignment loss, gradient of the teacher: every teacher row gathers from the student rows that read it.

dT_j = Σ_i A_ij (a_i s_i + b_i r_i), with a and b from the forward pass and r_i resized again: no resized row is ever
stored, nothing is added atomically, and the order of the sum is that of the student's rows. See ``alignment_loss``.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .alignment_loss import TILE_FIELDS, Config, load_wide, ratio, resized, row_stride, sample
from .launch import Launch
from .primitives import rounded


@triton.jit
def weight(index, j, scale, source):
    """What position ``index`` takes of j among ``source``."""
    lower, of_next = sample(index, scale, source)
    return tl.where(lower == j, 1 - of_next, tl.where(lower + 1 == j, of_next, 0.0))


@triton.jit
def readers(j, size, scale, source):
    """The positions among ``size`` with a weight for j among ``source``: the first, and how many.

    They are consecutive. The ends solve x(i) = j ± 1, each moved outwards by up to one position, more than rounding can
    be off, and back where that position does not read j.
    """
    inverse = ratio(size, source)
    first = tl.maximum(tl.floor((j - 0.5) * inverse - 0.5).to(tl.int32), 0)
    last = tl.minimum(tl.floor((j + 1.5) * inverse).to(tl.int32), size - 1)
    first += tl.where(weight(first, j, scale, source) == 0, 1, 0)
    last -= tl.where(weight(last, j, scale, source) == 0, 1, 0)
    return first, tl.maximum(last + 1 - first, 0)


@triton.jit
def alignment_teacher_gradient(
    student_ptr,
    teacher_ptr,
    tiles_ptr,
    coefficients_ptr,
    dteacher_ptr,
    STUDENT_STRIDE: tl.constexpr,
    TEACHER_STRIDE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """The teacher rows of one tile, one after the other, from R student rows at a time. Zeros where nobody reads."""
    tile = tiles_ptr + tl.program_id(0) * TILE_FIELDS
    first, end = tl.load(tile), tl.load(tile + 1)
    begin, teacher_begin = tl.load(tile + 2), tl.load(tile + 3)
    h, w, teacher_h, teacher_w = tl.load(tile + 4), tl.load(tile + 5), tl.load(tile + 6), tl.load(tile + 7)
    scales = (ratio(teacher_h, h), ratio(teacher_w, w))
    columns = tl.arange(0, BLOCK_D)  # [C]
    in_row = columns[None, :] < D
    for row in tl.range(first.to(tl.int64), end.to(tl.int64)):
        j = (row - teacher_begin).to(tl.int32)
        y_first, height = readers(j // teacher_w, h, scales[0], teacher_h)
        x_first, width = readers(j % teacher_w, w, scales[1], teacher_w)
        count = height * width
        sums = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
        for start in tl.range(0, count, BLOCK_ROWS):
            index = start + tl.arange(0, BLOCK_ROWS)[:, None]  # [R, 1], and so are y, x, i, share, a, b
            is_row = index < count
            y, x = y_first + index // width, x_first + index % width
            i = (begin + y * w + x).to(tl.int64)
            share = weight(y, j // teacher_w, scales[0], teacher_h) * weight(x, j % teacher_w, scales[1], teacher_w)
            a = share * tl.load(coefficients_ptr + 2 * i, is_row, other=0.0)
            b = share * tl.load(coefficients_ptr + 2 * i + 1, is_row, other=0.0)
            mask = is_row & in_row
            s = load_wide(student_ptr + i * STUDENT_STRIDE + columns[None, :], mask)  # [R, C]
            r = resized(
                teacher_ptr, teacher_begin, y, x, scales, teacher_h, teacher_w, columns[None, :], mask, TEACHER_STRIDE
            )
            sums += a * s + b * r
        dt = rounded(tl.sum(sums, 0), dteacher_ptr.dtype.element_ty)
        tl.store(dteacher_ptr + row * D + columns, dt, columns < D)


def teacher_gradient(
    config: Config, student: Any, teacher: Any, tiles: Any, coefficients: Any, dteacher: Any
) -> tuple[Launch, ...]:
    """The launch that fills ``dteacher``. ``tiles``: a table of teacher rows; ``coefficients`` [N, 2] from forward."""
    arguments = {
        "student_ptr": student,
        "teacher_ptr": teacher,
        "tiles_ptr": tiles,
        "coefficients_ptr": coefficients,
        "dteacher_ptr": dteacher,
        "STUDENT_STRIDE": row_stride(student),
        "TEACHER_STRIDE": row_stride(teacher),
        "D": student.shape[1],
        "BLOCK_D": config.block_d,
        "BLOCK_ROWS": config.block_rows,
    }
    return (Launch(alignment_teacher_gradient, (tiles.shape[0],), arguments, config.num_warps, 1),)
