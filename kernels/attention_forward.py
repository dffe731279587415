"""Symbiotic attention, forward: flash attention over the tiles of a schedule.

A program computes one tile of query rows of one head. Its keys come as tiles, in two lists of the schedule: *edge*
tiles, where the two integers of every key decide who sees it, then ranges of *whole* tiles, without any mask
arithmetic. (In this order ptxas keeps the matrix products of both loops asynchronous.) Online softmax in base 2, with
c = scale · log2 e:

    m' = max(m, max_j c s_j)                      p_j = 2^(c s_j − m')
    total ← total 2^(m − m') + Σ_j p_j            acc ← acc 2^(m − m') + Σ_j p_j v_j            m ← m'

and in the end out = acc / total, lse = (m + log2 total) ln 2. All of it is float32, but for the factors of the matrix
products, which have the inputs' dtype.

head_dim is computed in one or two column blocks, D0 and D1 wide (``config.head_dim_parts``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from .config import AttentionConfig, head_dim_parts
from .launch import Launch, head_strides, tile_sources
from .primitives import LN_2, LOG2_E, dot, load_rows, rounded, store_rows, visible, zeros

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def _attend_tile(
    acc0, acc1, m, total, q0, q1, query, k0_source, k1_source, v0_source, v1_source, begin_ptr, end_ptr, tile, head,
    num_keys, stride_k_row, STRIDE_K_HEAD: tl.constexpr, stride_v_row, STRIDE_V_HEAD: tl.constexpr, scale2,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr,
    HOLES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The online-softmax update with one tile of keys. acc0 [M, D0], acc1 [M, D1], m and total [M]."""
    first = tile * BLOCK_N
    k0 = load_rows(k0_source, first, num_keys, head, stride_k_row, STRIDE_K_HEAD, 0, D0, HEAD_DIM, BLOCK_N, EDGE, TMA)
    s = dot(q0, k0.T)  # [M, N]
    if D1 > 0:
        k1 = load_rows(
            k1_source, first, num_keys, head, stride_k_row, STRIDE_K_HEAD, D0, D1, HEAD_DIM, BLOCK_N, EDGE, TMA
        )
        s = dot(q1, k1.T, s)
    if EDGE:
        key = first + tl.arange(0, BLOCK_N)
        begin = tl.load(begin_ptr + key, key < num_keys, other=0)  # [N]
        end = tl.load(end_ptr + key, key < num_keys, other=0)
        s = tl.where(visible(query[:, None], begin[None, :], end[None, :]), s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * scale2)
    shift = m_new
    if EDGE:
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row that has seen no key yet: −∞ − −∞ is no number
    p = tl.exp2(s * scale2 - shift[:, None])  # [M, N]
    alpha = tl.exp2(m - shift)
    total = total * alpha + tl.sum(p, 1)
    v0 = load_rows(v0_source, first, num_keys, head, stride_v_row, STRIDE_V_HEAD, 0, D0, HEAD_DIM, BLOCK_N, EDGE, TMA)
    if EDGE and HOLES:
        v0 = tl.where((begin < end)[:, None], v0, 0.0).to(v0.dtype)
    p = rounded(p, v0.dtype)
    acc0 = dot(p, v0, acc0 * alpha[:, None])
    if D1 > 0:
        v1 = load_rows(
            v1_source, first, num_keys, head, stride_v_row, STRIDE_V_HEAD, D0, D1, HEAD_DIM, BLOCK_N, EDGE, TMA
        )
        if EDGE and HOLES:
            v1 = tl.where((begin < end)[:, None], v1, 0.0).to(v1.dtype)
        acc1 = dot(p, v1, acc1 * alpha[:, None])
    return acc0, acc1, m_new, total


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def attention_forward_kernel(
    q_ptr, k0_source, k1_source, v0_source, v1_source, out_ptr, lse_ptr, begin_ptr, end_ptr, query_tiles_ptr,
    whole_ranges_ptr, edge_tiles_ptr, out_rows_ptr, scale, num_queries, num_keys, stride_q_row,
    STRIDE_Q_HEAD: tl.constexpr, stride_k_row, STRIDE_K_HEAD: tl.constexpr, stride_v_row, STRIDE_V_HEAD: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HOLES: tl.constexpr, NEGATE: tl.constexpr, REORDER: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """One tile of query rows of one head; see the module.

    HOLES: key rows that nobody sees may hold anything. REORDER: row t of the output is stored at out_rows[t].
    NEGATE: scale is negative. The maximum is taken before scaling, by |scale|, so the sign goes to q.
    """
    program = tl.program_id(0)
    head = program % HEADS
    kv_head = head // GROUP
    entry = query_tiles_ptr + (program // HEADS) * 8
    first = tl.load(entry) * BLOCK_M
    query = first + tl.arange(0, BLOCK_M)  # [M]
    scale2 = tl.abs(scale) * LOG2_E
    scale2 = tl.where(scale2 == 0, 1e-37, scale2)  # the scores come to nothing either way, but −∞ · 0 is no number
    q0 = load_rows(q_ptr, first, num_queries, head, stride_q_row, STRIDE_Q_HEAD, 0, D0, HEAD_DIM, BLOCK_M, True, False)
    q1 = q0
    if D1 > 0:
        q1 = load_rows(
            q_ptr, first, num_queries, head, stride_q_row, STRIDE_Q_HEAD, D0, D1, HEAD_DIM, BLOCK_M, True, False
        )
    if NEGATE:
        q0 = -q0
        q1 = -q1
    acc0 = zeros(BLOCK_M, D0)
    acc1 = zeros(BLOCK_M, D1)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for i in range(tl.load(entry + 3), tl.load(entry + 4)):
        tile = tl.load(edge_tiles_ptr + i)
        acc0, acc1, m, total = _attend_tile(
            acc0, acc1, m, total, q0, q1, query, k0_source, k1_source, v0_source, v1_source, begin_ptr, end_ptr,
            tile, kv_head, num_keys, stride_k_row, STRIDE_K_HEAD, stride_v_row, STRIDE_V_HEAD, scale2,
            HEAD_DIM, D0, D1, BLOCK_N, True, HOLES, TMA,
        )  # fmt: skip
    for i in range(tl.load(entry + 1), tl.load(entry + 2)):
        for tile in range(tl.load(whole_ranges_ptr + 2 * i), tl.load(whole_ranges_ptr + 2 * i + 1)):
            acc0, acc1, m, total = _attend_tile(
                acc0, acc1, m, total, q0, q1, query, k0_source, k1_source, v0_source, v1_source, begin_ptr, end_ptr,
                tile, kv_head, num_keys, stride_k_row, STRIDE_K_HEAD, stride_v_row, STRIDE_V_HEAD, scale2,
                HEAD_DIM, D0, D1, BLOCK_N, False, HOLES, TMA,
            )  # fmt: skip
    rows = query.to(tl.int64)
    is_query = query < num_queries
    total = tl.where(is_query, total, 1.0)  # rows past the end have seen nothing; they are not stored
    if REORDER:
        rows = tl.load(out_rows_ptr + query, is_query, other=0)
    store_rows(out_ptr, rows, is_query, head, acc0 / total[:, None], HEADS, 0, D0, HEAD_DIM)
    if D1 > 0:
        store_rows(out_ptr, rows, is_query, head, acc1 / total[:, None], HEADS, D0, D1, HEAD_DIM)
    tl.store(lse_ptr + head.to(tl.int64) * num_queries + query, (m + tl.log2(total)) * LN_2, is_query)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    query_begin: Tensor,
    query_end: Tensor,
    schedule: Any,
    out_rows: Tensor | None,
    scale: float,
    config: AttentionConfig,
) -> tuple[Launch, ...]:
    """The launch that fills ``out`` and ``lse``.

    Args:
        q: [T, Hq, D], unit stride in the last dimension, as k and v.
        k: [K, Hkv, D].
        v: [K, Hkv, D].
        out: [T, Hq, D], contiguous, q's dtype.
        lse: float32 [Hq, T], contiguous.
        query_begin: int32 [K], with query_end the mask.
        query_end: int32 [K].
        schedule: ``unigendet.schedule.TileSchedule`` for the tiles of ``config``.
        out_rows: int64 [T], the row of ``out`` for each query row; None: the same.
        scale: factor of the scores.
        config: tile sizes and launch options.
    """
    heads, head_dim = q.shape[1], q.shape[2]
    d0, d1 = head_dim_parts(head_dim)
    sources = tile_sources(config.tma, {"k": (k, config.block_n), "v": (v, config.block_n)}, d0, d1)
    arguments = {
        "q_ptr": q,
        **sources,
        "out_ptr": out,
        "lse_ptr": lse,
        "begin_ptr": query_begin,
        "end_ptr": query_end,
        "query_tiles_ptr": schedule.query_tiles,
        "whole_ranges_ptr": schedule.whole_ranges,
        "edge_tiles_ptr": schedule.edge_tiles,
        "out_rows_ptr": out_rows,
        "scale": scale,
        "num_queries": q.shape[0],
        "num_keys": k.shape[0],
        **head_strides(q=q, k=k, v=v),
        "HEADS": heads,
        "GROUP": heads // k.shape[1],
        "HEAD_DIM": head_dim,
        "D0": d0,
        "D1": d1,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "HOLES": schedule.holes,
        "NEGATE": scale < 0,
        "REORDER": out_rows is not None,
        "TMA": config.tma,
    }
    grid = (schedule.query_tiles.shape[0] * heads,)
    return (Launch(attention_forward_kernel, grid, arguments, config.num_warps, config.num_stages),)
