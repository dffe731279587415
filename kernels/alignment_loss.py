"""The alignment loss, forward: a program goes through some consecutive tokens of one image.

Shapes in comments: R student rows of a tile, C the columns D padded to a power of two. A row of the student is read
once and stays in registers; the up to four rows of the teacher that it is compared with come through the caches, since
its neighbours read them, too. With s, r, ε and κ of ``unigendet.ops.alignment_loss``, per row

    c = s · r / (n_s n_r)    distance = u (1 − c)    ds = a r + b_s s    dr = a s + b_r r
    a = −κ u / (n_s n_r)     b_s = κ u [‖s‖ > ε] c / n_s²                b_r = κ u [‖r‖ > ε] c / n_r²

Kernels find their rows in tables, int32 [tiles, 8]: first row and the end, both counted in the pack; the image's first
student row and first teacher row; h, w, teacher h, teacher w.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from .launch import Launch
from .primitives import rounded

TILE_FIELDS = tl.constexpr(8)
EPS = tl.constexpr(1e-8)


@triton.jit
def ratio(a, b):
    """a / b of two integers in float32."""
    return tl.div_rn(a.to(tl.float32), b.to(tl.float32))


@triton.jit
def sample(index, scale, source):
    """Where position ``index`` lies among ``source``, ``scale`` times as many: the lower neighbour, the next's weight.

    As ``F.interpolate(mode="bilinear", align_corners=False)``. The last one has no next, and the weight is 0. It is
    exactly 0, too, for a scale of 1.
    """
    position = tl.maximum((index + 0.5) * scale - 0.5, 0.0)
    lower = tl.minimum(position.to(tl.int32), source - 1)
    return lower, tl.where(lower < source - 1, position - lower.to(tl.float32), 0.0)


@triton.jit
def load_wide(pointers, mask):
    """What is there as float32, 0 where masked."""
    return tl.load(pointers, mask, other=0.0).to(tl.float32)


@triton.jit
def resized(teacher_ptr, begin, y, x, scales, teacher_h, teacher_w, columns, mask, STRIDE: tl.constexpr):
    """Rows of the resized teacher at the student's places y, x [R, 1]: [R, C]. Rows of weight 0 are not read."""
    lower_y, next_y = sample(y, scales[0], teacher_h)
    lower_x, next_x = sample(x, scales[1], teacher_w)
    row = begin + lower_y * teacher_w + lower_x
    upper = teacher_ptr + row.to(tl.int64) * STRIDE + columns
    lower = upper + teacher_w.to(tl.int64) * STRIDE
    in_x, in_y = mask & (next_x > 0), mask & (next_y > 0)
    t00 = tl.load(upper, mask, other=0.0)
    t01 = tl.load(upper + STRIDE, in_x, other=0.0)
    t10 = tl.load(lower, in_y, other=0.0)
    t11 = tl.load(lower + STRIDE, in_x & in_y, other=0.0)
    first = (1 - next_x) * t00.to(tl.float32) + next_x * t01.to(tl.float32)
    second = (1 - next_x) * t10.to(tl.float32) + next_x * t11.to(tl.float32)
    return (1 - next_y) * first + next_y * second


@triton.jit
def kappa(scale, normalizer_ptr):
    """``scale``, divided by the number on the device if there is one."""
    if normalizer_ptr is not None:
        scale = tl.div_rn(scale, tl.load(normalizer_ptr))
    return scale


@triton.jit
def alignment_forward(
    student_ptr,
    teacher_ptr,
    tiles_ptr,
    normalizer_ptr,
    token_weights_ptr,
    distances_ptr,
    dstudent_ptr,
    coefficients_ptr,
    scale,
    STUDENT_STRIDE: tl.constexpr,
    TEACHER_STRIDE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    UNIT_STUDENT: tl.constexpr,
    UNIT_TEACHER: tl.constexpr,
):
    """The tokens of one tile: distances [N], dstudent [N, D], and a and b_r for the teacher's gradient [N, 2].

    What is None is left out; without ``token_weights_ptr`` they are ones. κ is ``scale`` / normalizer; a gradient that
    is UNIT is written with 1 in its place.
    """
    tile = tiles_ptr + tl.program_id(0) * TILE_FIELDS
    first, end = tl.load(tile), tl.load(tile + 1)
    begin, teacher_begin = tl.load(tile + 2), tl.load(tile + 3)
    h, w, teacher_h, teacher_w = tl.load(tile + 4), tl.load(tile + 5), tl.load(tile + 6), tl.load(tile + 7)
    scales = (ratio(teacher_h, h), ratio(teacher_w, w))
    factor = kappa(scale, normalizer_ptr)
    columns = tl.arange(0, BLOCK_D)[None, :]  # [1, C]
    for start in tl.range(first, end, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)[:, None]  # [R, 1]
        is_row = row < end
        mask = is_row & (columns < D)  # [R, C]
        token = row - begin
        s = load_wide(student_ptr + row.to(tl.int64) * STUDENT_STRIDE + columns, mask)  # [R, C]
        r = resized(
            teacher_ptr,
            teacher_begin,
            token // w,
            token % w,
            scales,
            teacher_h,
            teacher_w,
            columns,
            mask,
            TEACHER_STRIDE,
        )  # [R, C]
        s_length = tl.sqrt_rn(tl.sum(s * s, 1, keep_dims=True))  # [R, 1], and so are all that follow
        r_length = tl.sqrt_rn(tl.sum(r * r, 1, keep_dims=True))
        s_norm, r_norm = tl.maximum(s_length, EPS), tl.maximum(r_length, EPS)
        cross = tl.div_rn(1.0, s_norm * r_norm)
        cos = tl.div_rn(tl.sum(s * r, 1, keep_dims=True), s_norm * r_norm)
        if token_weights_ptr is not None:
            u = tl.load(token_weights_ptr + row, is_row, other=0.0)
        else:
            u = tl.full([BLOCK_ROWS, 1], 1.0, tl.float32)
        tl.store(distances_ptr + row, u * (1 - cos), is_row)
        if dstudent_ptr is not None:
            k = u if UNIT_STUDENT else u * factor
            own = tl.where(s_length > EPS, tl.div_rn(k * cos, s_norm * s_norm), 0.0)
            ds = own * s - (k * cross) * r
            pointers = dstudent_ptr + row.to(tl.int64) * D + columns
            tl.store(pointers, rounded(ds, dstudent_ptr.dtype.element_ty), mask)
        if coefficients_ptr is not None:
            k = u if UNIT_TEACHER else u * factor
            pair = coefficients_ptr + 2 * row.to(tl.int64)
            tl.store(pair, -(k * cross), is_row)
            tl.store(pair + 1, tl.where(r_length > EPS, tl.div_rn(k * cos, r_norm * r_norm), 0.0), is_row)


@triton.jit
def alignment_image_sums(images_ptr, distances_ptr, token_weights_ptr, sums_ptr, means_ptr, BLOCK: tl.constexpr):
    """Of one image: Σ distances, and that over Σ token weights. The order depends on the number of tokens alone."""
    image = tl.program_id(0)
    first, end = tl.load(images_ptr + image * TILE_FIELDS), tl.load(images_ptr + image * TILE_FIELDS + 1)
    rows = tl.arange(0, BLOCK)
    distances = tl.zeros([BLOCK], tl.float32)
    counts = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(first, end, BLOCK):
        is_row = start + rows < end
        distances += tl.load(distances_ptr + start + rows, is_row, other=0.0)
        if token_weights_ptr is not None:
            counts += tl.load(token_weights_ptr + start + rows, is_row, other=0.0)
    distance = tl.sum(distances, 0)
    if token_weights_ptr is not None:
        count = tl.sum(counts, 0)
    else:
        count = (end - first).to(tl.float32)
    tl.store(sums_ptr + image, distance)
    tl.store(means_ptr + image, tl.div_rn(distance, count))


@triton.jit(do_not_specialize=["images"])
def alignment_total(sums_ptr, normalizer_ptr, loss_ptr, scale, images, BLOCK: tl.constexpr):
    """loss = κ Σ over images, by one program."""
    index = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, images, BLOCK):
        sums += tl.load(sums_ptr + start + index, start + index < images, other=0.0)
    tl.store(loss_ptr, kappa(scale, normalizer_ptr) * tl.sum(sums, 0))


@triton.jit(do_not_specialize=["rows"])
def alignment_scale(
    gradient_ptr,
    factor_ptr,
    out_ptr,
    unchanged,
    rows,
    STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """out = factor · gradient [rows, D], rounded once; nothing where the factor is ``unchanged``."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != unchanged:
        across: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
        for tile in tl.range(tl.program_id(0), (rows + BLOCK_ROWS - 1) // BLOCK_ROWS * across, tl.num_programs(0)):
            row = tile // across * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
            columns = tile % across * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
            mask = (row < rows) & (columns < D)
            x = load_wide(gradient_ptr + row.to(tl.int64) * STRIDE + columns, mask)
            pointers = out_ptr + row.to(tl.int64) * OUT_STRIDE + columns
            tl.store(pointers, rounded(factor * x, out_ptr.dtype.element_ty), mask)


@dataclass(frozen=True)
class Config:
    """How rows are cut into programs.

    Attributes:
        rows: consecutive student rows of an image that a program goes through.
        block_rows: of these, rows that are one tile.
        teacher_rows: consecutive teacher rows that a program of its gradient goes through.
        block_d: columns of a tile, padded to a power of two.
        num_warps: warps of a program.
    """

    rows: int
    block_rows: int
    teacher_rows: int
    block_d: int
    num_warps: int


def configure(columns: int) -> Config:
    """Launch options for D = ``columns``: the same on every device, and with them the order of the sums.

    A thread holds 16 numbers of the student and as many of four teacher rows: in bfloat16 ten 16-byte loads, which are
    all issued before the first is used. At BAGEL's 3584 columns that is 35 KB per program, and four programs of 8 warps
    fit on a multiprocessor; 8 tokens read 10 columns of teacher rows from L2 where one reads 2, and an image of 64 × 64
    is 512 programs. Narrow rows share a tile, so that a thread has as much to load. Over
    8192 columns 32 warps leave 64 registers to a thread, of which float32 spills a few.
    """
    block_d = triton.next_power_of_2(columns)
    block_rows = max(1, min(32, 1024 // block_d))
    rows = max(8, block_rows)
    return Config(rows, block_rows, 4, block_d, min(32, max(1, block_rows * block_d // 512)))


def row_stride(x: Any) -> int:
    """Elements from row to row. A single row may have any stride; it must not make another kernel."""
    return x.stride(0) if x.shape[0] > 1 else x.shape[1]


def forward(
    config: Config,
    student: Any,
    teacher: Any,
    tiles: Any,
    images: Any,
    normalizer: Any | None,
    token_weights: Any | None,
    scale: float,
    units: tuple[bool, bool],
    outputs: tuple[Any, Any, Any | None],
    scratch: tuple[Any, Any, Any | None],
) -> tuple[Launch, ...]:
    """The launches that fill (loss, image means, dstudent) = ``outputs``; dstudent may be None.

    ``tiles`` and ``images`` are tables (see above) of ``config.rows`` tokens and of whole images. ``scratch`` is
    float32: distances [N], sums [images], and [N, 2] coefficients for the teacher's gradient or None. ``normalizer``
    and ``token_weights`` are float32; κ is ``scale`` divided by the one. ``units``: whether the student's and the
    teacher's gradients are kept without κ. The last dimensions of student and teacher are contiguous.
    """
    loss, means, dstudent = outputs
    distances, sums, coefficients = scratch
    arguments = {
        "student_ptr": student,
        "teacher_ptr": teacher,
        "tiles_ptr": tiles,
        "normalizer_ptr": normalizer,
        "token_weights_ptr": token_weights,
        "distances_ptr": distances,
        "dstudent_ptr": dstudent,
        "coefficients_ptr": coefficients,
        "scale": scale,
        "STUDENT_STRIDE": row_stride(student),
        "TEACHER_STRIDE": row_stride(teacher),
        "D": student.shape[1],
        "BLOCK_D": config.block_d,
        "BLOCK_ROWS": config.block_rows,
        "UNIT_STUDENT": units[0],
        "UNIT_TEACHER": units[1],
    }
    image_arguments = {
        "images_ptr": images,
        "distances_ptr": distances,
        "token_weights_ptr": token_weights,
        "sums_ptr": sums,
        "means_ptr": means,
        "BLOCK": 1024,
    }
    total_arguments = {"sums_ptr": sums, "normalizer_ptr": normalizer, "loss_ptr": loss, "scale": scale}
    total_arguments |= {"images": images.shape[0], "BLOCK": 128}
    return (
        Launch(alignment_forward, (tiles.shape[0],), arguments, config.num_warps, 1),
        Launch(alignment_image_sums, (images.shape[0],), image_arguments, 4, 1),
        Launch(alignment_total, (1,), total_arguments, 1, 1),
    )


def scale(gradient: Any, factor: Any, out: Any) -> tuple[Launch, ...]:
    """The launch for out = factor · gradient [rows, D]; in place nothing is written where the factor is 1.

    ``factor`` is a 0-d tensor. All programs are resident at once, so that one that has nothing to do costs little.
    """
    rows, columns = gradient.shape
    block_d = min(512, triton.next_power_of_2(columns))
    block_rows = 4096 // block_d
    tiles = triton.cdiv(rows, block_rows) * triton.cdiv(columns, block_d)
    arguments = {
        "gradient_ptr": gradient,
        "factor_ptr": factor,
        "out_ptr": out,
        "unchanged": 1.0 if out is gradient else float("nan"),
        "rows": rows,
        "STRIDE": row_stride(gradient),
        "OUT_STRIDE": row_stride(out),
        "D": columns,
        "BLOCK_D": block_d,
        "BLOCK_ROWS": block_rows,
    }
    return (Launch(alignment_scale, (min(tiles, 1024),), arguments, 4, 1),)
