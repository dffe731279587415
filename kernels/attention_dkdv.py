"""Symbiotic attention, backward for k and v, over the transposed schedule.

A program computes dk and dv of one tile of key rows of one key/value head: over the query heads of its group and over
the query tiles that see the keys, with transposed scores [keys, queries]. In the notation of ``attention_dq``,

    dv_j = Σ_i p_ij dO_i      dk_j = scale Σ_i ds_ij q_i

The query tiles are the entry's active interval; those in its whole interval need no mask. Every program sums in a fixed
order and writes rows of its own, so that results are the same in every run. With ATOMIC_DQ the program also adds its
part of dq (in float32, unscaled) to memory; their order is not fixed, but no scores are computed a second time.
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
def _add_rows(
    ptr, rows, is_row, head, x, HEADS: tl.constexpr, COLUMN: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Atomically add x [ROWS, WIDTH] to some columns of one head of a contiguous float32 [rows, HEADS, HEAD_DIM]."""
    columns = COLUMN + tl.arange(0, WIDTH)
    pointers = ptr + rows.to(tl.int64)[:, None] * (HEADS * HEAD_DIM) + (head * HEAD_DIM + columns)[None, :]
    tl.atomic_add(pointers, x, is_row[:, None] & (columns < HEAD_DIM)[None, :], sem="relaxed")


@triton.jit
def _dkdv_tile(
    dk0, dk1, dv0, dv1, k0, k1, v0, v1, begin, end, q0_source, q1_source, do0_source, do1_source, lse_ptr, delta_ptr,
    dq_ptr, tile, head, num_queries, stride_q_row, STRIDE_Q_HEAD: tl.constexpr, stride_do_row,
    STRIDE_DO_HEAD: tl.constexpr, scale2, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, BLOCK_M: tl.constexpr, EDGE: tl.constexpr, ATOMIC_DQ: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Add one tile of queries of one head to dk0, dv0 [N, D0] and dk1, dv1 [N, D1]."""
    first = tile * BLOCK_M
    query = first + tl.arange(0, BLOCK_M)  # [M]
    is_query = query < num_queries
    q0 = load_rows(
        q0_source, first, num_queries, head, stride_q_row, STRIDE_Q_HEAD, 0, D0, HEAD_DIM, BLOCK_M, EDGE, TMA
    )
    st = dot(k0, q0.T)  # [N, M]
    if D1 > 0:
        q1 = load_rows(
            q1_source, first, num_queries, head, stride_q_row, STRIDE_Q_HEAD, D0, D1, HEAD_DIM, BLOCK_M, EDGE, TMA
        )
        st = dot(k1, q1.T, st)
    do0 = load_rows(
        do0_source, first, num_queries, head, stride_do_row, STRIDE_DO_HEAD, 0, D0, HEAD_DIM, BLOCK_M, EDGE, TMA
    )
    dpt = dot(v0, do0.T)
    if D1 > 0:
        do1 = load_rows(
            do1_source, first, num_queries, head, stride_do_row, STRIDE_DO_HEAD, D0, D1, HEAD_DIM, BLOCK_M, EDGE, TMA
        )
        dpt = dot(v1, do1.T, dpt)
    per_head = head.to(tl.int64) * num_queries
    if EDGE:
        lse2 = tl.load(lse_ptr + per_head + query, is_query, other=0.0) * LOG2_E  # [M]
        delta = tl.load(delta_ptr + per_head + query, is_query, other=0.0)
    else:
        lse2 = tl.load(lse_ptr + per_head + query) * LOG2_E
        delta = tl.load(delta_ptr + per_head + query)
    pt = tl.exp2(st * scale2 - lse2[None, :])
    if EDGE:
        pt = tl.where(visible(query[None, :], begin[:, None], end[:, None]), pt, 0.0)
    p = rounded(pt, k0.dtype)
    dv0 = dot(p, do0, dv0)
    if D1 > 0:
        dv1 = dot(p, do1, dv1)
    ds = rounded(pt * (dpt - delta[None, :]), k0.dtype)  # [N, M]
    dk0 = dot(ds, q0, dk0)
    if D1 > 0:
        dk1 = dot(ds, q1, dk1)
    if ATOMIC_DQ:
        _add_rows(dq_ptr, query, is_query, head, dot(ds.T, k0), HEADS, 0, D0, HEAD_DIM)
        if D1 > 0:
            _add_rows(dq_ptr, query, is_query, head, dot(ds.T, k1), HEADS, D0, D1, HEAD_DIM)
    return dk0, dk1, dv0, dv1


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def attention_dkdv_kernel(
    q0_source, q1_source, k_ptr, v_ptr, do0_source, do1_source, dk_ptr, dv_ptr, dq_ptr, lse_ptr, delta_ptr, begin_ptr,
    end_ptr, key_tiles_ptr, scale, num_queries, num_keys, stride_q_row, STRIDE_Q_HEAD: tl.constexpr, stride_k_row,
    STRIDE_K_HEAD: tl.constexpr, stride_v_row, STRIDE_V_HEAD: tl.constexpr, stride_do_row,
    STRIDE_DO_HEAD: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ATOMIC_DQ: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One tile of key rows of one key/value head; see the module."""
    program = tl.program_id(0)
    kv_head = program % (HEADS // GROUP)
    entry = key_tiles_ptr + (program // (HEADS // GROUP)) * 8
    first = tl.load(entry) * BLOCK_N
    active_begin = tl.load(entry + 1)
    active_end = tl.load(entry + 2)
    whole_begin = tl.load(entry + 3)
    whole_end = tl.load(entry + 4)
    key = first + tl.arange(0, BLOCK_N)  # [N]
    is_key = key < num_keys
    begin = tl.load(begin_ptr + key, is_key, other=0)
    end = tl.load(end_ptr + key, is_key, other=0)
    # A row that nobody sees may hold anything; its gradient is zero.
    seen = (begin < end)[:, None]
    k0 = load_rows(k_ptr, first, num_keys, kv_head, stride_k_row, STRIDE_K_HEAD, 0, D0, HEAD_DIM, BLOCK_N, True, False)
    v0 = load_rows(v_ptr, first, num_keys, kv_head, stride_v_row, STRIDE_V_HEAD, 0, D0, HEAD_DIM, BLOCK_N, True, False)
    k0 = tl.where(seen, k0, 0.0).to(k0.dtype)
    v0 = tl.where(seen, v0, 0.0).to(v0.dtype)
    k1 = k0
    v1 = v0
    if D1 > 0:
        k1 = load_rows(
            k_ptr, first, num_keys, kv_head, stride_k_row, STRIDE_K_HEAD, D0, D1, HEAD_DIM, BLOCK_N, True, False
        )
        v1 = load_rows(
            v_ptr, first, num_keys, kv_head, stride_v_row, STRIDE_V_HEAD, D0, D1, HEAD_DIM, BLOCK_N, True, False
        )
        k1 = tl.where(seen, k1, 0.0).to(k1.dtype)
        v1 = tl.where(seen, v1, 0.0).to(v1.dtype)
    scale2 = scale * LOG2_E
    dk0 = zeros(BLOCK_N, D0)
    dv0 = zeros(BLOCK_N, D0)
    dk1 = zeros(BLOCK_N, D1)
    dv1 = zeros(BLOCK_N, D1)
    # For each kind of tile one loop over (query tile, head of the group); edges lie on both sides of the whole ones.
    before = whole_begin - active_begin
    for i in range((before + active_end - whole_end) * GROUP):
        nth = i // GROUP
        tile = tl.where(nth < before, active_begin + nth, whole_end + nth - before)
        dk0, dk1, dv0, dv1 = _dkdv_tile(
            dk0, dk1, dv0, dv1, k0, k1, v0, v1, begin, end, q0_source, q1_source, do0_source, do1_source, lse_ptr,
            delta_ptr, dq_ptr, tile, kv_head * GROUP + i % GROUP, num_queries, stride_q_row, STRIDE_Q_HEAD,
            stride_do_row, STRIDE_DO_HEAD, scale2, HEADS, HEAD_DIM, D0, D1, BLOCK_M, True, ATOMIC_DQ, TMA,
        )  # fmt: skip
    for i in range((whole_end - whole_begin) * GROUP):
        dk0, dk1, dv0, dv1 = _dkdv_tile(
            dk0, dk1, dv0, dv1, k0, k1, v0, v1, begin, end, q0_source, q1_source, do0_source, do1_source, lse_ptr,
            delta_ptr, dq_ptr, whole_begin + i // GROUP, kv_head * GROUP + i % GROUP, num_queries, stride_q_row,
            STRIDE_Q_HEAD, stride_do_row, STRIDE_DO_HEAD, scale2, HEADS, HEAD_DIM, D0, D1, BLOCK_M, False, ATOMIC_DQ,
            TMA,
        )  # fmt: skip
    rows = key.to(tl.int64)
    store_rows(dk_ptr, rows, is_key, kv_head, dk0 * scale, HEADS // GROUP, 0, D0, HEAD_DIM)
    store_rows(dv_ptr, rows, is_key, kv_head, dv0, HEADS // GROUP, 0, D0, HEAD_DIM)
    if D1 > 0:
        store_rows(dk_ptr, rows, is_key, kv_head, dk1 * scale, HEADS // GROUP, D0, D1, HEAD_DIM)
        store_rows(dv_ptr, rows, is_key, kv_head, dv1, HEADS // GROUP, D0, D1, HEAD_DIM)


def attention_dkdv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    dk: Tensor,
    dv: Tensor,
    dq_sum: Tensor | None,
    query_begin: Tensor,
    query_end: Tensor,
    schedule: Any,
    scale: float,
    config: AttentionConfig,
) -> tuple[Launch, ...]:
    """The launch that fills ``dk`` and ``dv``: [K, Hkv, D], contiguous, q's dtype.

    With ``dq_sum``, float32 [T, Hq, D] of zeros, contiguous, dq / scale is added there atomically. The others as in
    ``attention_dq``.
    """
    heads, kv_heads, head_dim = q.shape[1], k.shape[1], q.shape[2]
    d0, d1 = head_dim_parts(head_dim)
    sources = tile_sources(config.tma, {"q": (q, config.block_m), "do": (grad_out, config.block_m)}, d0, d1)
    arguments = {
        "k_ptr": k,
        "v_ptr": v,
        **sources,
        "dk_ptr": dk,
        "dv_ptr": dv,
        "dq_ptr": dq_sum,
        "lse_ptr": lse,
        "delta_ptr": delta,
        "begin_ptr": query_begin,
        "end_ptr": query_end,
        "key_tiles_ptr": schedule.key_tiles,
        "scale": scale,
        "num_queries": q.shape[0],
        "num_keys": k.shape[0],
        **head_strides(q=q, k=k, v=v, do=grad_out),
        "HEADS": heads,
        "GROUP": heads // kv_heads,
        "HEAD_DIM": head_dim,
        "D0": d0,
        "D1": d1,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "ATOMIC_DQ": dq_sum is not None,
        "TMA": config.tma,
    }
    grid = (schedule.key_tiles.shape[0] * kv_heads,)
    return (Launch(attention_dkdv_kernel, grid, arguments, config.num_warps, config.num_stages),)
