"""The ``torch`` backend of ``qk_norm_rope``: plain PyTorch, on a CPU in blocks of rows. Shapes as in that file."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unigendet.ops._arguments import compute_dtype, empty_unless, first_stream
from unigendet.ops._blocks import stream_blocks


def split(qkv: Tensor, heads: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The projection as q and k heads together [T, Hq + Hkv, D], and v heads [T, Hkv, D]."""
    rows = qkv.unflatten(1, (heads[0] + 2 * heads[1], -1))
    return rows[:, : -heads[1]], rows[:, -heads[1] :]


def per_head(q_weight: Tensor, k_weight: Tensor, heads: Sequence[int]) -> Tensor:
    """The weight of every head of q and k, [Hq + Hkv, D]."""
    return torch.cat((q_weight.expand(heads[0], -1), k_weight.expand(heads[1], -1)))


def allocate(qkv: Tensor, heads: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for q, k and v."""
    head_dim = qkv.shape[1] // (heads[0] + 2 * heads[1])
    return tuple(
        torch.empty((qkv.shape[0], h, head_dim), dtype=qkv.dtype, device=qkv.device)
        for h in (heads[0], heads[1], heads[1])
    )


def allocate_gradients(qkv: Tensor, norms: Sequence[Tensor], output_mask: Sequence[bool]) -> tuple[Tensor, ...]:
    """Memory for the gradients that are needed; empty tensors for the others."""
    return tuple(empty_unless(m, t.shape, t.dtype, t.device) for t, m in zip((qkv, *norms), output_mask, strict=True))


def forward(
    qkv: Tensor,
    norms: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    maps: Sequence[Tensor],
    lengths: Tensor,
    heads: Sequence[int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v."""
    to_sequence, to_stream, positions = maps
    n = first_stream("qkv", qkv, lengths)
    qk, v = split(qkv, heads)
    q, k, _ = outputs = allocate(qkv, heads)
    weights = _stream_weights(norms, heads, compute_dtype(qkv))
    for stream, rows in stream_blocks(n, len(qkv), qk[:1].numel(), qkv.device):
        wide = qk[rows].to(weights[0].dtype)
        h = wide * _rstd(wide, eps)
        h *= weights[stream]
        y = _rotate(h, cos, sin, positions.index_select(0, to_sequence[rows]), torch.empty_like(h)).to(qkv.dtype)
        for out, part in ((q, y[:, : heads[0]]), (k, y[:, heads[0] :])):
            out.index_copy_(0, to_sequence[rows], part)
    torch.index_select(v, 0, to_stream, out=outputs[2])
    return outputs


def _stream_weights(norms: Sequence[Tensor], heads: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both streams' norm weights of all heads of q and k, each [Hq + Hkv, D]."""
    q_und, q_gen, k_und, k_gen = (w.to(dtype) for w in norms)
    return per_head(q_und, k_und, heads), per_head(q_gen, k_gen, heads)


def _rstd(x: Tensor, eps: float) -> Tensor:
    """1 / RMS of the heads x [T, H, D], as [T, H, 1]."""
    return torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, out: Tensor) -> Tensor:
    """Rotate the heads x [T, H, D] by their rows' angles, into other memory; pass −sin to rotate back."""
    c, s = (t.index_select(0, positions).to(x.dtype).unsqueeze(1) for t in (cos, sin))
    (first, second), (out_first, out_second) = x.chunk(2, -1), out.chunk(2, -1)
    torch.mul(first, c, out=out_first).addcmul_(second, s, value=-1)
    torch.mul(second, c, out=out_second).addcmul_(first, s)
    return out


def backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    norms: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    maps: Sequence[Tensor],
    lengths: Tensor,
    heads: Sequence[int],
    eps: float,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients of qkv and of the four norm weights."""
    to_sequence, _, positions = maps
    n = first_stream("qkv", qkv, lengths)
    results = allocate_gradients(qkv, norms, output_mask)
    qk = split(qkv, heads)[0]
    weights = _stream_weights(norms, heads, compute_dtype(qkv))
    sums = [torch.zeros_like(w) for w in weights]
    for stream, rows in stream_blocks(n, len(qkv), qk[:1].numel(), qkv.device):
        sequence_rows = to_sequence[rows]
        wide = qk[rows].to(weights[0].dtype)
        dy = torch.cat([x.index_select(0, sequence_rows) for x in (dq, dk)], 1).to(wide.dtype)
        dn = _rotate(dy, cos, -sin, positions.index_select(0, sequence_rows), torch.empty_like(dy))
        rstd = _rstd(wide, eps)
        h = wide * rstd
        if output_mask[1 + stream] or output_mask[3 + stream]:
            sums[stream] += (dn * h).sum(0)
        if output_mask[0]:
            dqk, dv_rows = (x[rows] for x in split(results[0], heads))
            dn *= weights[stream]
            mean = torch.linalg.vecdot(dn, h).div_(h.shape[-1]).unsqueeze(-1)
            dqk.copy_(dn.sub_(h.mul_(mean)).mul_(rstd))
            dv_rows.copy_(dv.index_select(0, sequence_rows))
    by_head = [s[columns] for columns in (slice(0, heads[0]), slice(heads[0], None)) for s in sums]
    for needed, result, gradient in zip(output_mask[1:], results[1:], by_head, strict=True):
        if needed:
            result.copy_(gradient.sum(0))
    return results
