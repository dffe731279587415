"""``qk_norm_rope``: per-head norm with the stream's weight, RoPE, and the move from stream-major to sequence order.

Peers: the same with PyTorch's norm on slices, eager and compiled; the published way (each stream's heads are gathered,
normed, and scattered into a zeroed buffer, then rotated), which gets its rows in sequence order and moves none.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from unigendet.ops import qk_norm_rope, rope_table

from . import traces
from .candidate import Candidate
from .contest import Case, Work
from .judge import whole
from .published import plain_norm
from .stream_case import candidates, random

OP = "qk_norm_rope"
EPS = 1e-6
THETA = 1e6


def case(device: torch.device, dtype: torch.dtype, trace: traces.Trace, heads: tuple[int, int], head_dim: int) -> Case:
    """qkv [T, (Hq + 2·Hkv)·head_dim] of a trace's pack; ``heads`` are (Hq, Hkv)."""
    layout = trace.layout.to(device)
    rows, (query_heads, kv_heads) = layout.num_queries, heads
    tables = rope_table(layout.max_position + 1, head_dim, THETA, device=device)
    cos, sin = (torch.cat((t, t), -1)[layout.positions][:, None] for t in tables)
    und, gen = layout.stream_to_sequence.split(layout.stream_lengths.tolist())

    def inputs(seed: int) -> tuple[Tensor, ...]:
        make = random(device, dtype, seed)
        qkv = make(rows, (query_heads + 2 * kv_heads) * head_dim).requires_grad_()
        return qkv, *((1 + 0.1 * make(head_dim)).requires_grad_() for _ in range(4))

    def own(qkv: Tensor, q_und: Tensor, q_gen: Tensor, k_und: Tensor, k_gen: Tensor, backend: str) -> tuple:
        heads = {"num_heads": query_heads, "num_kv_heads": kv_heads}
        weights = (q_und, q_gen), (k_und, k_gen)
        return qk_norm_rope(qkv, *weights, *tables, layout, **heads, eps=EPS, backend=backend)

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos.to(x.dtype) + torch.cat((-second, first), -1) * sin.to(x.dtype)

    def heads_of(qkv: Tensor) -> tuple[Tensor, ...]:
        rows = qkv.unflatten(1, (query_heads + 2 * kv_heads, head_dim))
        return rows.split((query_heads, kv_heads, kv_heads), dim=1)

    def eager(qkv: Tensor, q_und: Tensor, q_gen: Tensor, k_und: Tensor, k_gen: Tensor) -> tuple[Tensor, ...]:
        q, k, v = heads_of(qkv)
        found = []
        for x, weights in ((q, (q_und, q_gen)), (k, (k_und, k_gen))):
            parts = zip(x.split(layout.stream_lengths.tolist()), weights, strict=True)
            normed = torch.cat([F.rms_norm(part, (head_dim,), weight, EPS) for part, weight in parts])
            found.append(rotated(normed.index_select(0, layout.sequence_to_stream)))
        return *found, v.index_select(0, layout.sequence_to_stream)

    def published(qkv: Tensor, q_und: Tensor, q_gen: Tensor, k_und: Tensor, k_gen: Tensor) -> tuple[Tensor, ...]:
        q, k, v = heads_of(qkv)
        found = []
        for x, weight_und, weight_gen in ((q, q_und, q_gen), (k, k_und, k_gen)):
            normed = torch.zeros_like(x)
            normed[und] = plain_norm(x[und], weight_und, EPS)
            normed[gen] = plain_norm(x[gen], weight_gen, EPS)
            found.append(rotated(normed))
        return *found, v.clone()

    def in_sequence() -> Candidate:
        """Its input and its gradient in sequence order; outputs are in it anyway."""
        arrange = lambda x: x.index_select(0, layout.sequence_to_stream) if x.dim() == 2 else x  # noqa: E731
        restore = lambda x: x.index_select(0, layout.stream_to_sequence) if x.dim() == 2 else x  # noqa: E731
        return Candidate(published, arrange, restore)

    size = dtype.itemsize * rows * (query_heads + 2 * kv_heads) * head_dim
    values = dtype.itemsize * rows * kv_heads * head_dim  # which the backward pass need not read
    return Case(
        OP,
        f"{rows} x ({query_heads} + 2*{kv_heads})*{head_dim}",
        dtype,
        inputs,
        work={"forward": Work(bytes=2 * size), "backward": Work(bytes=3 * size - values)},
        truth=whole(partial(own, backend="reference")),
        trace=trace.name,
        **candidates(OP, device, dtype, eager, own, {"published": in_sequence}),
    )


def cases(device: torch.device, size: str) -> Iterator[Case]:
    """BAGEL-7B's heads in bfloat16 on GPUs, a small model's in float32 on CPUs."""
    if size == "tiny":
        yield case(device, torch.float32, traces.tiny(), (4, 2), 16)
    elif device.type == "cuda":
        yield case(device, torch.bfloat16, traces.trace("gduf_32k"), (28, 4), 128)
    else:
        yield case(device, torch.float32, traces.trace("gduf_4k"), (8, 2), 64)
