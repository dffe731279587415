"""A plain function in the place of a FlashAttention library: what varlen attention means, problem by problem."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from unigendet.ops._arguments import compute_dtype
from unigendet.ops.symbiotic_attention_flash import Call, Library


def _problems(call: Call, queries: int, keys: int):
    """(query rows, key rows, mask [Lq, Lk]) of each problem, after checking what the libraries ask for."""
    ends = []
    for cu_seqlens, longest, rows in (
        (call.cu_seqlens_q, call.max_seqlen_q, queries),
        (call.cu_seqlens_k, call.max_seqlen_k, keys),
    ):
        assert cu_seqlens.dtype == torch.int32
        assert cu_seqlens.is_contiguous()
        assert cu_seqlens[0] == 0
        assert cu_seqlens[-1] == rows
        assert cu_seqlens.diff().min() > 0
        assert cu_seqlens.diff().max() == longest
        ends.append([slice(*pair) for pair in pairwise(cu_seqlens.tolist())])
    for q, k in zip(*ends, strict=True):
        mask = torch.ones(q.stop - q.start, k.stop - k.start, dtype=torch.bool)
        yield q, k, mask.tril(mask.shape[1] - mask.shape[0]) if call.causal else mask


def _check_rows(*tensors: Tensor) -> None:
    for x in tensors:
        assert x.stride(-1) == 1
        assert all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
        assert x.data_ptr() % 16 == 0


def _scores(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> Tensor:
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return torch.einsum("qhd,khd->hqk", q, k).mul(scale).masked_fill(~mask, float("-inf"))


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float) -> tuple[Tensor, Tensor]:
    _check_rows(q, k, v)
    wide = compute_dtype(q)
    out, lse = torch.empty_like(q), torch.empty(q.shape[1], q.shape[0], dtype=wide)
    for rows, keys, mask in _problems(call, len(q), len(k)):
        scores = _scores(q[rows].to(wide), k[keys].to(wide), mask, scale)
        values = v[keys].to(wide).repeat_interleave(q.shape[1] // k.shape[1], 1)
        lse[:, rows] = scores.logsumexp(-1)
        out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).to(q.dtype)
    return out, lse


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    _check_rows(grad_out, q, k, v, out)
    assert lse.is_contiguous()
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    wide, heads = compute_dtype(q), (k.shape[1], -1)
    group = q.shape[1] // k.shape[1]
    for rows, keys, mask in _problems(call, len(q), len(k)):
        queries, grad = q[rows].to(wide), grad_out[rows].to(wide)
        p = torch.exp(_scores(queries, k[keys].to(wide), mask, scale) - lse[:, rows, None])
        dp = torch.einsum("qhd,khd->hqk", grad, v[keys].to(wide).repeat_interleave(group, 1))
        delta = (grad * out[rows].to(wide)).sum(-1).T
        ds = p * (dp - delta[..., None]) * scale
        dq[rows] = torch.einsum("hqk,khd->qhd", ds, k[keys].to(wide).repeat_interleave(group, 1)).to(q.dtype)
        dk[keys] = torch.einsum("hqk,qhd->khd", ds, queries).unflatten(1, heads).sum(2).to(k.dtype)
        dv[keys] = torch.einsum("hqk,qhd->khd", p, grad).unflatten(1, heads).sum(2).to(v.dtype)
    return dq, dk, dv


LIBRARY = Library("dense", forward, backward)
