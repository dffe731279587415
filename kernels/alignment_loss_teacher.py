"""The alignment loss, gradient of the teacher: every teacher row gathers from the student rows that read it.

dT_j = Σ_i A_ij (a_i s_i + b_i r_i), with a and b from the forward pass and r_i resized again: no resized row is ever
stored, nothing is added atomically, and the order of the sum is that of the student's rows. See ``alignment_loss``.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .alignment_loss import TILE_FIELDS, Config, load_wide, resized, row_stride, sample
from .launch import Launch
from .primitives import rounded


@triton.jit
def weight(index, j, size, source):
    """What position ``index`` of ``size`` takes of j among ``source``."""
    lower, of_next = sample(index, size, source)
    return tl.where(lower == j, 1 - of_next, tl.where(lower + 1 == j, of_next, 0.0))


@triton.jit
def readers(j, size, source):
    """The positions among ``size`` with a weight for j among ``source``: the first and the end; none if it is before.

    They are an interval. Its ends solve x(i) = j ± 1, each moved outwards by up to one position, more than rounding can
    be off, and back where that position does not read j.
    """
    inverse = tl.div_rn(size.to(tl.float32), source.to(tl.float32))
    first = tl.maximum(tl.floor((j - 0.5) * inverse - 0.5).to(tl.int32), 0)
    last = tl.minimum(tl.floor((j + 1.5) * inverse).to(tl.int32), size - 1)
    first += tl.where(weight(first, j, size, source) == 0, 1, 0)
    last -= tl.where(weight(last, j, size, source) == 0, 1, 0)
    return first, last + 1


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
):
    """The teacher rows of one tile, one after the other. Rows that nobody reads get zeros."""
    tile = tiles_ptr + tl.program_id(0) * TILE_FIELDS
    first, end = tl.load(tile), tl.load(tile + 1)
    begin, teacher_begin = tl.load(tile + 2), tl.load(tile + 3)
    h, w, teacher_h, teacher_w = tl.load(tile + 4), tl.load(tile + 5), tl.load(tile + 6), tl.load(tile + 7)
    sizes = (h, w, teacher_h, teacher_w)
    columns = tl.arange(0, BLOCK_D)[None, :]  # [1, C]
    mask = columns < D
    tile_row = tl.zeros([1, 1], tl.int32)
    for row in tl.range(first.to(tl.int64), end.to(tl.int64)):
        j = (row - teacher_begin).to(tl.int32)
        teacher_y, teacher_x = j // teacher_w, j % teacher_w
        y_first, y_end = readers(teacher_y, h, teacher_h)
        x_first, x_end = readers(teacher_x, w, teacher_w)
        sums = tl.zeros([1, BLOCK_D], tl.float32)
        for y in tl.range(y_first, y_end):
            weight_y = weight(y, teacher_y, h, teacher_h)
            for x in tl.range(x_first, x_end):
                share = weight_y * weight(x, teacher_x, w, teacher_w)
                i = (begin + y * w + x).to(tl.int64)
                s = load_wide(student_ptr + i * STUDENT_STRIDE + columns, mask)
                r = resized(
                    teacher_ptr, teacher_begin, y + tile_row, x + tile_row, sizes, columns, mask, TEACHER_STRIDE
                )
                a, b = tl.load(coefficients_ptr + 2 * i), tl.load(coefficients_ptr + 2 * i + 1)
                sums += (share * a) * s + (share * b) * r
        pointers = dteacher_ptr + row * D + columns
        tl.store(pointers, rounded(sums, dteacher_ptr.dtype.element_ty), mask)


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
    }
    num_warps = min(32, max(1, config.block_d // 512))
    return (Launch(alignment_teacher_gradient, (tiles.shape[0],), arguments, num_warps, 1),)
