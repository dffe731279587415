"""Symbiotic attention, backward for q, over the schedule of the forward pass.

A program computes dq of one tile of query rows of one head. From the saved lse and delta (``attention_delta``):

    p_j = 2^(c s_j − lse log2 e)      ds_j = p_j (dO · v_j − delta)      dq = scale Σ_j ds_j k_j
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from .config import AttentionConfig, head_dim_parts
from .launch import Launch, head_strides, tile_sources
from .primitives import LOG2_E, dot, load_rows, rounded, store_rows, visible, zeros

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def _dq_tile(
    dq0, dq1, q0, q1, do0, do1, lse2, delta, query, k0_source, k1_source, v0_source, v1_source, begin_ptr, end_ptr,
    tile, head, num_keys, stride_k_row, STRIDE_K_HEAD: tl.constexpr, stride_v_row, STRIDE_V_HEAD: tl.constexpr, scale2,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr,
    HOLES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to dq0 [M, D0], dq1 [M, D1]. ``lse2``: lse in base 2 [M]; ``scale2``: scale · log2 e."""
    first = tile * BLOCK_N
    k0 = load_rows(k0_source, first, num_keys, head, stride_k_row, STRIDE_K_HEAD, 0, D0, HEAD_DIM, BLOCK_N, EDGE, TMA)
    v0 = load_rows(v0_source, first, num_keys, head, stride_v_row, STRIDE_V_HEAD, 0, D0, HEAD_DIM, BLOCK_N, EDGE, TMA)
    if EDGE:
        key = first + tl.arange(0, BLOCK_N)
        begin = tl.load(begin_ptr + key, key < num_keys, other=0)  # [N]
        end = tl.load(end_ptr + key, key < num_keys, other=0)
        if HOLES:
            k0 = tl.where((begin < end)[:, None], k0, 0.0).to(k0.dtype)
            v0 = tl.where((begin < end)[:, None], v0, 0.0).to(v0.dtype)
    s = dot(q0, k0.T)  # [M, N]
    dp = dot(do0, v0.T)
    if D1 > 0:
        k1 = load_rows(
            k1_source, first, num_keys, head, stride_k_row, STRIDE_K_HEAD, D0, D1, HEAD_DIM, BLOCK_N, EDGE, TMA
        )
        v1 = load_rows(
            v1_source, first, num_keys, head, stride_v_row, STRIDE_V_HEAD, D0, D1, HEAD_DIM, BLOCK_N, EDGE, TMA
        )
        if EDGE and HOLES:
            k1 = tl.where((begin < end)[:, None], k1, 0.0).to(k1.dtype)
            v1 = tl.where((begin < end)[:, None], v1, 0.0).to(v1.dtype)
        s = dot(q1, k1.T, s)
        dp = dot(do1, v1.T, dp)
    p = tl.exp2(s * scale2 - lse2[:, None])
    if EDGE:
        p = tl.where(visible(query[:, None], begin[None, :], end[None, :]), p, 0.0)
    ds = rounded(p * (dp - delta[:, None]), k0.dtype)
    dq0 = dot(ds, k0, dq0)
    if D1 > 0:
        dq1 = dot(ds, k1, dq1)
    return dq0, dq1


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def attention_dq_kernel(
    q_ptr, k0_source, k1_source, v0_source, v1_source, do_ptr, dq_ptr, lse_ptr, delta_ptr, begin_ptr, end_ptr,
    query_tiles_ptr, whole_ranges_ptr, edge_tiles_ptr, scale, num_queries, num_keys, stride_q_row,
    STRIDE_Q_HEAD: tl.constexpr, stride_k_row, STRIDE_K_HEAD: tl.constexpr, stride_v_row, STRIDE_V_HEAD: tl.constexpr,
    stride_do_row, STRIDE_DO_HEAD: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HOLES: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """One tile of query rows of one head; see the module."""
    program = tl.program_id(0)
    head = program % HEADS
    kv_head = head // GROUP
    entry = query_tiles_ptr + (program // HEADS) * 8
    first = tl.load(entry) * BLOCK_M
    query = first + tl.arange(0, BLOCK_M)  # [M]
    is_query = query < num_queries
    q0 = load_rows(q_ptr, first, num_queries, head, stride_q_row, STRIDE_Q_HEAD, 0, D0, HEAD_DIM, BLOCK_M, True, False)
    do0 = load_rows(
        do_ptr, first, num_queries, head, stride_do_row, STRIDE_DO_HEAD, 0, D0, HEAD_DIM, BLOCK_M, True, False
    )
    q1 = q0
    do1 = do0
    if D1 > 0:
        q1 = load_rows(
            q_ptr, first, num_queries, head, stride_q_row, STRIDE_Q_HEAD, D0, D1, HEAD_DIM, BLOCK_M, True, False
        )
        do1 = load_rows(
            do_ptr, first, num_queries, head, stride_do_row, STRIDE_DO_HEAD, D0, D1, HEAD_DIM, BLOCK_M, True, False
        )
    per_head = head.to(tl.int64) * num_queries
    lse2 = tl.load(lse_ptr + per_head + query, is_query, other=0.0) * LOG2_E  # [M]
    delta = tl.load(delta_ptr + per_head + query, is_query, other=0.0)
    scale2 = scale * LOG2_E
    dq0 = zeros(BLOCK_M, D0)
    dq1 = zeros(BLOCK_M, D1)
    for i in range(tl.load(entry + 3), tl.load(entry + 4)):
        tile = tl.load(edge_tiles_ptr + i)
        dq0, dq1 = _dq_tile(
            dq0, dq1, q0, q1, do0, do1, lse2, delta, query, k0_source, k1_source, v0_source, v1_source,
            begin_ptr, end_ptr, tile, kv_head, num_keys, stride_k_row, STRIDE_K_HEAD, stride_v_row, STRIDE_V_HEAD,
            scale2, HEAD_DIM, D0, D1, BLOCK_N, True, HOLES, TMA,
        )  # fmt: skip
    for i in range(tl.load(entry + 1), tl.load(entry + 2)):
        for tile in range(tl.load(whole_ranges_ptr + 2 * i), tl.load(whole_ranges_ptr + 2 * i + 1)):
            dq0, dq1 = _dq_tile(
                dq0, dq1, q0, q1, do0, do1, lse2, delta, query, k0_source, k1_source, v0_source, v1_source,
                begin_ptr, end_ptr, tile, kv_head, num_keys, stride_k_row, STRIDE_K_HEAD, stride_v_row, STRIDE_V_HEAD,
                scale2, HEAD_DIM, D0, D1, BLOCK_N, False, HOLES, TMA,
            )  # fmt: skip
    rows = query.to(tl.int64)
    store_rows(dq_ptr, rows, is_query, head, dq0 * scale, HEADS, 0, D0, HEAD_DIM)
    if D1 > 0:
        store_rows(dq_ptr, rows, is_query, head, dq1 * scale, HEADS, D0, D1, HEAD_DIM)


def attention_dq(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    query_begin: Tensor,
    query_end: Tensor,
    schedule: Any,
    scale: float,
    config: AttentionConfig,
) -> tuple[Launch, ...]:
    """The launch that fills ``dq``: [T, Hq, D], contiguous, q's dtype.

    ``grad_out`` [T, Hq, D] in sequence order, ``lse`` and ``delta`` float32 [Hq, T] contiguous; the others as in
    ``attention_forward``. Unit stride in the last dimension of q, k, v and grad_out.
    """
    heads, head_dim = q.shape[1], q.shape[2]
    d0, d1 = head_dim_parts(head_dim)
    sources = tile_sources(config.tma, {"k": (k, config.block_n), "v": (v, config.block_n)}, d0, d1)
    arguments = {
        "q_ptr": q,
        **sources,
        "do_ptr": grad_out,
        "dq_ptr": dq,
        "lse_ptr": lse,
        "delta_ptr": delta,
        "begin_ptr": query_begin,
        "end_ptr": query_end,
        "query_tiles_ptr": schedule.query_tiles,
        "whole_ranges_ptr": schedule.whole_ranges,
        "edge_tiles_ptr": schedule.edge_tiles,
        "scale": scale,
        "num_queries": q.shape[0],
        "num_keys": k.shape[0],
        **head_strides(q=q, k=k, v=v, do=grad_out),
        "HEADS": heads,
        "GROUP": heads // k.shape[1],
        "HEAD_DIM": head_dim,
        "D0": d0,
        "D1": d1,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "HOLES": schedule.holes,
        "TMA": config.tma,
    }
    grid = (schedule.query_tiles.shape[0] * heads,)
    return (Launch(attention_dq_kernel, grid, arguments, config.num_warps, config.num_stages),)
