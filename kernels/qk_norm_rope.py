"""Per-head RMSNorm, RoPE and the move from stream-major rows to sequence order, in one pass in each direction.

Shapes in comments: H q and k heads of a tile, V v heads, C columns of half a head, D head_dim, each padded to a power
of two. A head is two tiles, its halves 1 and 2, since RoPE rotates column i with column i + D/2. A row's q and k heads
are cut into groups of H heads; a group's program also moves its share of the row's v heads.

Both directions compute in float32 and round once, where they store. So do plain PyTorch's operators; the two differ in
the order of sums, in rsqrt (off by up to 2^-22.9 on a GPU) and in fused multiply-adds, which only leave roundings out.
Off from exact arithmetic, with u = 2^-24 and to first order, whatever the order, are at most:

- A sum of D squares is off by at most D·u relatively, so rstd by (D/2 + 4) u and n = w · (x · rstd) by (D/2 + 6) u.
- y1 = n1 cos − n2 sin: each product and the sum add a rounding. |error| ≤ (D/2 + 8) u (|n1 cos| + |n2 sin|).
- Write G = |w| (|dy1 cos| + |dy2 sin|), which bounds |g|, and M = mean(G |h|). g is off by 3 u G, h by (D/2 + 5) u |h|,
  mean(g · h) by (3D/2 + 10) u M, and dx = rstd (g − h · mean(g · h)) by rstd (D/2 + 9) u G + rstd |h| (5D/2 + 22) u M.
- dw is a sum of N products dn · h: (D/2 + 8 + N) u Σ |dn| |h|, with |dn| replaced by its bound |dy1 cos| + |dy2 sin|.

Two implementations may differ by twice that, and by one spacing of the dtype that they round to. v is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from .primitives import rounded


@triton.jit
def head_pointers(
    q_ptr, k_ptr, q_row, k_row, stride_q_row, stride_q_head, stride_k_row, stride_k_head, heads, Q_HEADS: tl.constexpr
):
    """Pointers to the heads [H] of one row: q's in row ``q_row`` of one tensor, k's in row ``k_row`` of another."""
    q = q_ptr + q_row * stride_q_row + heads.to(tl.int64) * stride_q_head
    k = k_ptr + k_row * stride_k_row + (heads - Q_HEADS).to(tl.int64) * stride_k_head
    return tl.where(heads < Q_HEADS, q, k)


@triton.jit
def load(pointers, mask):
    """What is there as float32, 0 where masked."""
    return tl.load(pointers, mask, other=0.0).to(tl.float32)


@triton.jit
def store(pointers, x, mask):
    """Round float32 ``x`` once, to the pointers' dtype."""
    tl.store(pointers, rounded(x, pointers.dtype.element_ty), mask)


@triton.jit
def per_head(q_pointers, k_pointers, is_q, mask):
    """A weight for every head, q's or k's: [1, C] twice → [H, C]."""
    return tl.where(is_q, load(q_pointers, mask), load(k_pointers, mask))


@triton.jit
def inverse_rms(x1, x2, eps, HEAD_DIM: tl.constexpr):
    """1 / sqrt(mean(x²) + eps) of every head: [H, C] twice → [H, 1]."""
    return tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, 1)[:, None] / HEAD_DIM + eps)


@dataclass(frozen=True)
class Config:
    """How a direction is cut into programs.

    Attributes:
        tile_heads: q and k heads of a program, a power of two.
        rows: rows that a program goes through one after the other.
        num_warps: warps of a program.
        num_stages: rows in flight, the one computed included.
    """

    tile_heads: int
    rows: int
    num_warps: int
    num_stages: int


def configure(capability: tuple[int, int], heads: Sequence[int], head_dim: int, direction: str) -> Config:
    """The launch options of ``direction``, "forward" or "backward", on a device of compute ``capability``.

    A tile has at most 4096 numbers. A thread holds 32 of them forward, and 16 each of x and of dy backward: several
    16-byte loads each. Sums are over ``tile_heads`` and ``rows``, which do not depend on the device. Backward, ptxas
    needs over 128 registers for three stages on sm_80, which would halve the programs per multiprocessor.
    """
    width = triton.next_power_of_2(head_dim)
    tile_heads = min(triton.next_power_of_2(sum(heads)), max(1, 4096 // width))
    numbers = tile_heads * width
    if direction == "forward":
        return Config(tile_heads, rows=1, num_warps=max(1, numbers // 1024), num_stages=1)
    return Config(tile_heads, rows=16, num_warps=max(1, numbers // 512), num_stages=3 if capability >= (9, 0) else 2)


def head_constants(heads: Sequence[int], head_dim: int, config: Config) -> dict[str, int]:
    """The constants of both kernels: how the heads (Hq, Hkv) of a row are spread over its programs."""
    groups = triton.cdiv(sum(heads), config.tile_heads)
    v_heads = triton.cdiv(heads[1], groups)
    return {
        "Q_HEADS": heads[0],
        "KV_HEADS": heads[1],
        "HEAD_DIM": head_dim,
        "COLUMNS": triton.next_power_of_2(head_dim // 2),
        "TILE_HEADS": config.tile_heads,
        "V_HEADS": v_heads,
        "V_TILE": triton.next_power_of_2(v_heads),
        "GROUPS": groups,
    }


def strides(**tensors: Any) -> dict[str, int]:
    """``stride_{name}`` of matrices, ``stride_{name}_row`` and ``_head`` of [rows, heads, head_dim]."""
    strides = {}
    for name, tensor in tensors.items():
        keys = (f"stride_{name}",) if len(tensor.shape) == 2 else (f"stride_{name}_row", f"stride_{name}_head")
        strides |= zip(keys, tensor.stride(), strict=False)
    return strides


def input_arguments(
    qkv: Any, norms: Sequence[Any], cos: Any, sin: Any, to_sequence: Any, positions: Any
) -> dict[str, Any]:
    """What both directions read. The last dimension of every tensor must be contiguous."""
    names = ("qkv_ptr", "q_und_ptr", "q_gen_ptr", "k_und_ptr", "k_gen_ptr", "cos_ptr", "sin_ptr")
    tensors = dict(zip(names, (qkv, *norms, cos, sin), strict=True))
    tensors |= {"to_sequence_ptr": to_sequence, "positions_ptr": positions}
    return tensors | strides(qkv=qkv, cos=cos, sin=sin)
