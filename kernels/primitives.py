"""What the kernels share: one matrix product, one mask predicate, one way to load rows.

Shapes in comments: M query rows of a tile, N key rows, D0 and D1 the two parts of head_dim (D1 = 0: one part).
"""

import math
import os

import triton
import triton.language as tl

# Triton decides when a kernel is defined; the interpreter multiplies and adds bfloat16 wrongly.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))


@triton.jit
def dot(a, b, acc=None):
    """a @ b (+ acc) in float32: [M, K] × [K, N]. float32 inputs are multiplied in float32, never in tf32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if acc is None:
        return tl.dot(a, b, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def visible(query, query_begin, query_end):
    """The mask: whether query row ``query`` sees the key of ``query_begin``, ``query_end`` (broadcasts)."""
    return (query_begin <= query) & (query < query_end)


@triton.jit
def zeros(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """A float32 accumulator [ROWS, WIDTH]; for WIDTH = 0 a placeholder that a loop can carry and nobody reads."""
    if WIDTH > 0:
        x = tl.zeros([ROWS, WIDTH], tl.float32)
    else:
        x = tl.zeros([ROWS], tl.float32)
    return x


@triton.jit
def load_rows(
    source,
    first,
    end,
    head,
    stride_row,
    stride_head,
    COLUMN: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
):
    """Rows first … first + ROWS of one head, columns COLUMN … COLUMN + WIDTH: [ROWS, WIDTH].

    ``source`` is a pointer, or a descriptor of a [rows, heads · HEAD_DIM] matrix with ROWS × WIDTH blocks. Rows from
    ``end`` on are zeros; without MASKED there must be none. Columns from HEAD_DIM on are zeros from a pointer; a
    descriptor gives the next head's, so the other factor of a product has to have the zeros. (An infinity or NaN in
    that head then reaches this one, too; only for a HEAD_DIM that is not its blocks' width, such as 72.)
    """
    if TMA:
        x = source.load([first, head * HEAD_DIM + COLUMN])
    else:
        rows = tl.arange(0, ROWS)
        columns = COLUMN + tl.arange(0, WIDTH)
        base = source + first.to(tl.int64) * stride_row + head.to(tl.int64) * stride_head
        pointers = base + rows[:, None] * stride_row + columns[None, :]  # [ROWS, WIDTH]
        if MASKED:
            if COLUMN + WIDTH > HEAD_DIM:
                x = tl.load(pointers, (first + rows < end)[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)
            else:
                x = tl.load(pointers, (first + rows < end)[:, None], other=0.0)
        elif COLUMN + WIDTH > HEAD_DIM:
            x = tl.load(pointers, (columns < HEAD_DIM)[None, :], other=0.0)
        else:
            x = tl.load(pointers)
    return x


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 ``x`` in ``dtype``, rounded to nearest even; the interpreter by itself cuts bfloat16 off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def store_rows(
    ptr,
    rows,
    is_row,
    head,
    x,
    HEADS: tl.constexpr,
    COLUMN: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Store float32 x [ROWS, WIDTH] into rows, int64 [ROWS], of one head of a contiguous [rows, HEADS, HEAD_DIM]."""
    columns = COLUMN + tl.arange(0, WIDTH)
    pointers = ptr + rows[:, None] * (HEADS * HEAD_DIM) + (head * HEAD_DIM + columns)[None, :]
    mask = is_row[:, None]
    if COLUMN + WIDTH > HEAD_DIM:
        mask = mask & (columns < HEAD_DIM)[None, :]
    tl.store(pointers, rounded(x, ptr.dtype.element_ty), mask)
