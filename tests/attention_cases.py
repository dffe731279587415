"""Packs, inputs and plain PyTorch for tests of attention."""

from __future__ import annotations

import torch
from op_checks import randn

from unigendet.layout import SPLIT_FIELDS, Layout

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Together: one token; a noised image between other splits; a prefix cached within a text, a noised image and an image.
PACKS = {
    "single tokens": {"samples": [[(1, "noise"), (1, "causal"), (1, "full"), (1, "causal")], [(1, "full")]]},
    "training": {
        "samples": [
            [(4, "full"), (5, "full"), (3, "causal"), (2, "causal")],
            [(3, "causal"), (4, "noise"), (2, "noise"), (2, "full"), (3, "causal"), (4, "noise")],
        ]
    },
    "cached": {
        "samples": [
            [(3, "full"), (6, "causal"), (2, "causal")],
            [(2, "causal"), (4, "noise"), (3, "full")],
            [(5, "noise"), (3, "causal"), (4, "full")],
            [(4, "causal"), (5, "noise")],
            [(4, "causal")],
        ],
        "cached": [5, 4, 10, 4, 4],
        "capacity": [13, 9, 12, 12, 7],
    },
}

# For tiles of 16 and 32 rows: one row; splits longer than a tile, so that whole tiles lie on both sides of edges;
# several noised images in a row; cached prefixes of whole tiles, with spare rows, and samples without queries.
TILE_PACKS = {
    "one token": {"samples": [[(1, "causal")]]},
    "image over tiles": {"samples": [[(3, "causal"), (50, "full"), (20, "noise")]]},
    "text over tiles": {"samples": [[(51, "causal"), (9, "full")], [(7, "causal")]]},
    "noised images": {"samples": [[(5, "causal"), (40, "noise"), (33, "noise"), (17, "full"), (1, "noise")]]},
    "cached tiles": {
        "samples": [[(40, "full"), (30, "causal")], [(5, "noise"), (20, "full")], [(33, "causal"), (34, "noise")]],
        "cached": [51, 25, 33],
        "capacity": [77, 40, 70],
    },
}


def factor_of(backend, dtype):
    """How many times the error of plain PyTorch is allowed.

    The gradient recomputes the probabilities from lse and takes delta from the output, where plain PyTorch keeps both.
    Beside what plain PyTorch loses by keeping scores in 2 bytes, that is nothing for kernels with float32 sums.
    """
    return 2 if backend == "triton" and dtype.itemsize == 2 else 4


def layout_of(name):
    """The layout of a pack, with every third query in the generation stream."""
    pack = (PACKS | TILE_PACKS)[name]
    queries = sum(n for s in pack["samples"] for n, _ in s) - sum(pack.get("cached", []))
    return Layout.from_splits(**pack, streams=[int(i % 3 == 1) for i in range(queries)])


def arguments(layout, *, heads=(4, 2), head_dim=8, dtype=torch.float32, holes=float("nan")):
    """q, k, v; key rows that no token occupies hold ``holes``."""
    q = randn(layout.num_queries, heads[0], head_dim, dtype=dtype)
    k, v = (randn(layout.num_keys, heads[1], head_dim, dtype=dtype, seed=i) for i in (1, 2))
    occupied = torch.zeros(layout.num_keys, dtype=torch.bool)
    for first, last in layout.splits.unflatten(0, (-1, len(SPLIT_FIELDS)))[:, 1:3].tolist():
        occupied[first:last] = True
    with torch.no_grad():
        k[~occupied], v[~occupied] = holes, holes
    return [q, k, v]


def plain(layout, scale=None, out_order="sequence"):
    """Attention as anyone would write it: scores and probabilities in the inputs' dtype, a dense mask."""
    mask = layout.dense_mask()
    seen = mask.any(0)[:, None, None]

    def call(q, k, v):
        group = q.shape[1] // k.shape[1]
        k, v = (torch.where(seen, x, 0).repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
        scores = q.transpose(0, 1) @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        scores = scores.masked_fill(~mask, float("-inf"))
        wide = scores if q.dtype == torch.float64 else scores.float()
        out = (scores.softmax(-1) @ v).transpose(0, 1)
        out = out[layout.stream_to_sequence] if out_order == "stream" else out
        return out, wide.logsumexp(-1)

    return call
