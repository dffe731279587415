"""Packs, inputs and plain PyTorch for tests of attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from numerics import assert_accurate, outputs_and_gradients
from op_checks import randn
from torch import Tensor

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
    return 2 if backend in ("triton", "cpp") and dtype.itemsize == 2 else 4


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


def assert_accurate_kernel(
    candidate: Callable[..., Any], expected: Callable[..., Any], inputs: Sequence[Tensor], backend: str
) -> None:
    """Output and lse are as accurate as a kernel can be; their gradients as ``factor_of`` says."""
    factor = factor_of(backend, inputs[0].dtype)
    if factor > 2:
        assert_accurate(candidate, expected, expected, [x.detach() for x in inputs], factor=2, seeds=1)
    assert_accurate(candidate, expected, expected, inputs, factor=factor, seeds=1)


def check_large_logits(
    candidate: Callable[..., Any], layout: Layout, sign: int, dtype: torch.dtype, backend: str
) -> None:
    """Scores of ±10⁴ overflow an exponential that is not shifted; all rows then have one winner, or equal losers.

    ``candidate`` returns output and lse, with a scale of 1/8.
    """
    q, k, v = arguments(layout, heads=(2, 1), dtype=dtype)
    with torch.no_grad():
        q.fill_(100.0 * sign)
        k.copy_(100.0 + torch.arange(layout.num_keys).remainder(5)[:, None, None] * 2)
    results = outputs_and_gradients(candidate, [q, k, v])
    exact = outputs_and_gradients(plain(layout, 0.125), [x.detach().double().requires_grad_() for x in (q, k, v)])
    assert results["output 1"].abs().max() > 9e3
    for name, value in exact.items():  # what goes through lse, as the gradient's probabilities do, has its rounding
        eps = torch.finfo(torch.float32).eps * 1.1e4 + torch.finfo(results[name].dtype).eps
        assert (results[name] - value).abs().max() <= 4 * eps * value.abs().max(), name
    assert_accurate_kernel(candidate, plain(layout, 0.125), [x.detach() for x in (q, k, v)], backend)


def strided_views(x: Tensor) -> Iterator[Tensor]:
    """The numbers of x in every other column, transposed, and beside other heads."""
    yield torch.stack((x, x + 1), -1)[..., 0]
    yield x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    yield torch.cat((x, x + 1), 1)[:, : x.shape[1]]


def _merging(attend: Callable[[Layout], Callable[..., Any]], first: Layout, second: Layout, length: int) -> Any:
    """Attention over keys in two parts: the middle ``length`` ones by ``second``, the others by ``first``."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        before = k.shape[0] - q.shape[0] - length
        middle = slice(before, before + length)
        k_rest, v_rest = (torch.cat((x[:before], x[before + length :])) for x in (k, v))
        parts = [attend(first)(q, k_rest, v_rest), attend(second)(q, k[middle], v[middle])]
        lse = torch.logaddexp(*(part for _, part in parts))
        return sum((part - lse).exp().T.unsqueeze(-1).to(out.dtype) * out for out, part in parts), lse

    return call


def check_merging(
    attend: Callable[[Layout], Callable[..., Any]], dtype: torch.dtype, backend: str, before: int, length: int
) -> None:
    """out and lse over two sets of keys determine, with gradients, those over all keys."""
    text = (length, "causal")
    whole = Layout.from_splits([[(before, "full"), (length, "full"), text]], cached=[before + length])
    first = Layout.from_splits([[(before, "full"), text]], cached=[before])
    second = Layout.from_splits([[(length, "full")]])
    inputs = arguments(whole, heads=(2, 1), dtype=dtype)
    call = _merging(attend, first, second, length)
    assert_accurate(call, plain(whole), plain(whole), inputs, factor=factor_of(backend, dtype), seeds=2)
