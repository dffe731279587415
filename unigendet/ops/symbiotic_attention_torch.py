"""The ``torch`` backend of ``symbiotic_attention``: plain PyTorch, efficient enough to train with, on any device.

Samples fall into two kinds, by their number of (query, key) pairs:

* small samples are batched: samples of similar size form one padded call with a mask, so that a pack of a hundred small
  samples costs a few calls and not a few hundred;
* a large sample is done split by split, without any mask: its queries attend to the visible keys before the split (one
  range, or gathered rows where noise splits leave gaps) and to the split itself. A causal split is two such calls,
  everything before it and the triangle of its own tokens, merged through their log-sum-exp.

The grouping follows from ``Layout.splits`` alone and is kept for the last packs seen: it is computed once per pack.

One call is ``attend`` / ``attend_backward`` on [batch, kv_heads, group, length, head_dim], where the query heads of a
group share a key head: PyTorch's fused CPU kernel where there is one, otherwise the same formulas on bounded chunks of
query rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from unigendet.layout import CAUSAL, NOISE, SPLIT_FIELDS, visible
from unigendet.ops._arguments import compute_dtype

SMALL_SAMPLE = 128 * 1024  # pairs up to which a sample is computed whole, masked, in a batch with others
BATCH_PAIRS = 1024 * 1024  # pairs of one batch, padding included
PADDING = 1.25  # computed pairs per useful pair (of the samples' rectangles) that a batch may cost
CHUNK_SCORES = 1 << 24  # scores held at a time by the unfused formulas


@dataclass(frozen=True, eq=False)
class Call:
    """One call: B problems of Lq query rows and Lk key rows. Rows are a slice (B = 1) or an index [B·Lq] / [B·Lk]."""

    batch: int
    query_rows: slice | Tensor
    key_rows: slice | Tensor
    mask: Tensor | None = None  # bool [B, Lq, Lk]; None = everything visible
    causal: bool = False  # square, own tokens of a causal split
    query_slots: Tensor | None = None  # of the B·Lq rows, the real ones; None = all
    query_padding: Tensor | None = None  # bool [B, 1, Lq], the others
    key_slots: Tensor | None = None
    merged: bool = False  # its queries also attend in the call before: outputs are merged
    _biases: dict[tuple[torch.dtype, int], Tensor] = field(default_factory=dict, repr=False)

    def bias(self, dtype: torch.dtype, repeats: int) -> Tensor | None:
        """The mask as an additive one [B, 1, repeats·Lq, Lk]: 0 where visible, −∞ elsewhere. Made once, for all layers.

        The rows come ``repeats`` times, one set after another.
        """
        if self.mask is not None and (dtype, repeats) not in self._biases:
            with torch.inference_mode(False):  # or a first call in inference mode would leave it unfit for training
                mask = self.mask.repeat(1, repeats, 1)
                zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
                self._biases[dtype, repeats] = zeros.masked_fill_(~mask, float("-inf")).unsqueeze(1)
        return self._biases.get((dtype, repeats))


@functools.lru_cache(maxsize=64)
def _plan(table: bytes, device: torch.device) -> tuple[Call, ...]:
    splits = np.frombuffer(table, np.int64).reshape(-1, len(SPLIT_FIELDS))
    mode, query_begin, query_end = splits[:, 0], splits[:, 5], splits[:, 6]
    splits = splits[(mode != NOISE) | (query_begin < query_end)]  # nobody sees a cached noise split
    small: list[_Sample] = []
    calls: list[Call] = []
    for rows in np.split(splits, np.flatnonzero(np.diff(splits[:, 3])) + 1):
        sample = _Sample.of(rows)
        if sample.queries and sample.queries * sample.keys <= SMALL_SAMPLE:
            small.append(sample)
        elif sample.queries:
            calls.extend(_split_calls(rows, device))
    return tuple(_batch_calls(small, device)) + tuple(calls)


def plan(splits: Tensor, device: torch.device) -> tuple[Call, ...]:
    """The calls for a pack. ``splits``: ``Layout.splits``."""
    return _plan(splits.numpy().tobytes(), device)


def _split_calls(rows: np.ndarray, device: torch.device) -> Iterator[Call]:
    """Calls of a large sample, one or two per split with queries."""
    visible_ranges: list[tuple[int, int]] = []  # keys before the split that its queries see
    for mode, key_begin, key_end, _, _, query_begin, query_end in rows.tolist():
        queries = slice(query_begin, query_end)
        length = query_end - query_begin
        own = key_end - length  # first key row that has a query; what lies before it in the split is cached
        if length and mode == CAUSAL:
            before = _merge_ranges([*visible_ranges, (key_begin, own)])
            if before:
                yield Call(1, queries, _range_rows(before, device))
            yield Call(1, queries, slice(own, key_end), causal=True, merged=bool(before))
        elif length:
            yield Call(1, queries, _range_rows(_merge_ranges([*visible_ranges, (key_begin, key_end)]), device))
        if mode != NOISE:
            visible_ranges = _merge_ranges([*visible_ranges, (key_begin, key_end)])


def _merge_ranges(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for begin, end in ranges:
        if begin == end:
            continue
        if merged and merged[-1][1] == begin:
            begin = merged.pop()[0]
        merged.append((begin, end))
    return merged


def _range_rows(ranges: list[tuple[int, int]], device: torch.device) -> slice | Tensor:
    return _as_rows(np.concatenate([np.arange(*r) for r in ranges]), device)


@dataclass(frozen=True)
class _Sample:
    """A small sample: its splits (rows of ``Layout.splits``), and how many query and key rows they have."""

    splits: np.ndarray
    queries: int
    keys: int

    @classmethod
    def of(cls, splits: np.ndarray) -> _Sample:
        return cls(splits, int((splits[:, 6] - splits[:, 5]).sum()), int((splits[:, 2] - splits[:, 1]).sum()))

    def query_rows(self, padded: int) -> np.ndarray:
        """Its query rows; padding repeats the last, a row that is valid and sees something."""
        return self.splits[0, 5] + np.minimum(np.arange(padded), self.queries - 1)

    def key_rows(self, padded: int) -> np.ndarray:
        rows = np.concatenate([np.arange(begin, end) for begin, end in self.splits[:, 1:3]])
        return np.pad(rows, (0, padded - self.keys), mode="edge")

    def mask(self, padded_queries: int, padded_keys: int) -> np.ndarray:
        """Its mask [padded_queries, padded_keys]; padded keys are invisible."""
        per_key = self.splits.repeat(self.splits[:, 2] - self.splits[:, 1], axis=0)
        mode, _, key_end, _, _, query_begin, query_end = per_key.T
        own = np.maximum(
            query_end - (key_end - self.key_rows(self.keys)), query_begin
        )  # a cached key: the split's first query
        begin = np.where(mode == CAUSAL, own, query_begin)
        end = np.where(mode == NOISE, query_end, self.splits[-1, 6])
        mask = np.zeros((padded_queries, padded_keys), bool)
        query = torch.from_numpy(self.query_rows(padded_queries))
        mask[:, : self.keys] = visible(query[:, None], torch.from_numpy(begin), torch.from_numpy(end)).numpy()
        return mask


def _batch_calls(samples: list[_Sample], device: torch.device) -> Iterator[Call]:
    """Batches of small samples of similar size."""
    group: list[_Sample] = []
    for sample in sorted(samples, key=lambda s: (s.queries, s.keys)):
        candidate = [*group, sample]
        computed = len(candidate) * max(s.queries for s in candidate) * max(s.keys for s in candidate)
        if group and (computed > BATCH_PAIRS or computed > PADDING * sum(s.queries * s.keys for s in candidate)):
            yield _batch_call(group, device)
            candidate = [sample]
        group = candidate
    if group:
        yield _batch_call(group, device)


def _batch_call(group: list[_Sample], device: torch.device) -> Call:
    queries, keys = np.array([s.queries for s in group]), np.array([s.keys for s in group])
    most_queries, most_keys = int(queries.max()), int(keys.max())
    real_queries, real_keys = (np.arange(n.max()) < n[:, None] for n in (queries, keys))
    mask = np.stack([s.mask(most_queries, most_keys) for s in group])
    to_device = lambda array: torch.from_numpy(array).to(device)  # noqa: E731
    return Call(
        batch=len(group),
        query_rows=_as_rows(np.concatenate([s.query_rows(most_queries) for s in group]), device),
        key_rows=_as_rows(np.concatenate([s.key_rows(most_keys) for s in group]), device),
        mask=None if mask.all() else to_device(mask),
        query_slots=None if real_queries.all() else to_device(np.flatnonzero(real_queries)),
        query_padding=None if real_queries.all() else to_device(~real_queries[:, None]),
        key_slots=None if real_keys.all() else to_device(np.flatnonzero(real_keys)),
    )


def _as_rows(rows: np.ndarray, device: torch.device) -> slice | Tensor:
    """A slice where the rows are consecutive: then nothing has to be gathered."""
    if (np.diff(rows) == 1).all():
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return torch.from_numpy(rows).to(device)


def forward(q: Tensor, k: Tensor, v: Tensor, splits: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output [T, Hq, D] and lse [Hq, T] in sequence order. Shapes as in ``symbiotic_attention``."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=compute_dtype(q), device=q.device)
    kv_heads = k.shape[1]
    q, k, v = (_with_dense_heads(_grouped(x, kv_heads)) for x in (q, k, v))
    outs, lses = _grouped(out, kv_heads), _grouped(lse.T, kv_heads)
    for call in plan(splits, q.device):
        take = functools.partial(_take, batch=call.batch)
        part, part_lse = attend(take(q, call.query_rows), take(k, call.key_rows), take(v, call.key_rows), scale, call)
        rows = _flat(part, call.query_slots)
        lse_rows = _flat(part_lse, call.query_slots)
        if call.merged:
            rows, lse_rows = _merge(outs[call.query_rows], lses[call.query_rows], rows, lse_rows)
        _put(outs, call.query_rows, call.query_slots, rows.to(out.dtype))
        _put(lses, call.query_rows, call.query_slots, lse_rows)
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    splits: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v; everything in sequence order. Keys that nobody sees get zeros."""
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    # Several splits may add to one key: in full precision, in the order of the calls, hence deterministically.
    dk, dv = (torch.zeros(x.shape, dtype=compute_dtype(x), device=x.device) for x in (k, v))
    kv_heads = k.shape[1]
    grad_out, q, k, v = (_with_dense_heads(_grouped(x, kv_heads)) for x in (grad_out, q, k, v))
    out, lse, dqs, dks, dvs = (_grouped(x, kv_heads) for x in (out, lse.T, dq, dk, dv))
    grad_lse = None if grad_lse is None else _grouped(grad_lse.T, kv_heads)
    for call in plan(splits, q.device):
        query = functools.partial(_take, rows=call.query_rows, batch=call.batch)
        key = functools.partial(_take, rows=call.key_rows, batch=call.batch)
        grad, grad_lse_part = query(grad_out), None if grad_lse is None else query(grad_lse)
        if call.query_padding is not None:  # padded queries repeat a real row, whose gradient must count once
            padding = call.query_padding.unsqueeze(1)  # [B, 1, 1, Lq]
            grad = grad.masked_fill(padding[..., None], 0)
            grad_lse_part = None if grad_lse is None else grad_lse_part.masked_fill(padding, 0)
        gq, gk, gv = attend_backward(grad, grad_lse_part, query(q), key(k), key(v), query(out), query(lse), scale, call)
        rows = _flat(gq, call.query_slots)
        if call.merged:
            rows = rows + dqs[call.query_rows]
        _put(dqs, call.query_rows, call.query_slots, rows.to(dq.dtype))
        _add(dks, call.key_rows, call.key_slots, _flat(gk, call.key_slots))
        _add(dvs, call.key_rows, call.key_slots, _flat(gv, call.key_slots))
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """x [T, H, ...] as [T, kv_heads, group, ...]: beside a key head the query heads that use it, or just itself."""
    return x.unflatten(1, (kv_heads, -1))


def _with_dense_heads(x: Tensor) -> Tensor:
    """x with unit stride in its last dimension: the fused CPU kernel ignores it and would read other numbers."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _take(x: Tensor, rows: slice | Tensor, batch: int) -> Tensor:
    """Rows of x [T, kv_heads, group, ...] as [batch, kv_heads, group, L, ...]."""
    taken = x[rows] if isinstance(rows, slice) else x.index_select(0, rows)
    return taken.unflatten(0, (batch, -1)).movedim(1, 3)


def _flat(x: Tensor, slots: Tensor | None) -> Tensor:
    """[batch, kv_heads, group, L, ...] → [real rows, kv_heads, group, ...]."""
    rows = x.movedim(3, 1).flatten(0, 1)
    return rows if slots is None else rows.index_select(0, slots)


def _put(x: Tensor, rows: slice | Tensor, slots: Tensor | None, values: Tensor) -> None:
    if isinstance(rows, slice):
        x[rows] = values
    else:
        x[rows if slots is None else rows[slots]] = values


def _add(x: Tensor, rows: slice | Tensor, slots: Tensor | None, values: Tensor) -> None:
    if isinstance(rows, slice):
        x[rows] += values
    else:  # every row occurs once in a call, so that the order of additions is fixed
        x.index_add_(0, rows if slots is None else rows[slots], values.to(x.dtype))


def _merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two key sets from the results over each. out [L, ..., D], lse [L, ...]."""
    weight = torch.sigmoid(lse_a - lse_b).unsqueeze(-1)  # the weights sum to 1, however large and rounded the lse are
    return out_a * weight + out_b * (1 - weight), torch.logaddexp(lse_a, lse_b)


def _fused(q: Tensor) -> bool:
    return q.device.type == "cpu"


@dataclass(frozen=True)
class _Heads:
    """The five dimensions of a call as the four [batch, heads, length, ...] of the fused kernel.

    Either the query heads of a group lie one below the other as rows of one problem, which reads its keys once and sums
    their gradients, or every query head is a problem, with keys repeated. The kernel's backward has one thread per
    problem, so there must be enough of them; and its causal mask knows no groups.
    """

    kv_heads: int
    group: int
    stacked: bool

    @classmethod
    def of(cls, q: Tensor, call: Call) -> _Heads:
        batch, kv_heads, group = q.shape[:3]
        return cls(kv_heads, group, not call.causal and batch * kv_heads >= torch.get_num_threads())

    def merge(self, x: Tensor) -> Tensor:
        """[B, kv_heads, group or 1, L, ...] → [B, heads, rows, ...]."""
        return x.flatten(2, 3) if self.stacked else x.expand(-1, -1, self.group, *x.shape[3:]).flatten(1, 2)

    def split(self, x: Tensor) -> Tensor:
        """The inverse of ``merge`` for what belongs to queries."""
        return x.unflatten(2, (self.group, -1)) if self.stacked else x.unflatten(1, (self.kv_heads, -1))

    def split_keys(self, grad: Tensor) -> Tensor:
        """The gradient of keys or values [B, kv_heads, 1, L, D], summed over the group."""
        return grad.unsqueeze(2) if self.stacked else self.split(grad).sum(2, keepdim=True)

    def bias(self, q: Tensor, call: Call) -> Tensor | None:
        return call.bias(q.dtype, self.group if self.stacked else 1)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, call: Call) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ scale + mask) v, like q, and lse. q [B, Hkv, group, Lq, D], k and v [B, Hkv, 1, Lk, D]."""
    if _fused(q):
        heads = _Heads.of(q, call)
        results = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *map(heads.merge, (q, k, v)), 0.0, call.causal, attn_mask=heads.bias(q, call), scale=scale
        )
        return tuple(map(heads.split, results))
    outs, lses = [], []
    for rows, keys in _chunks(q, k, call.causal):
        scores = _scores(q[..., rows, :], k[..., keys, :], scale, call, rows, keys)
        lses.append(scores.logsumexp(-1))
        outs.append(scores.softmax(-1) @ v[..., keys, :].to(scores.dtype))
    return torch.cat(outs, dim=3), torch.cat(lses, dim=3)


def attend_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    call: Call,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``attend``; out and lse may be those of a larger key set that this call is a part of."""
    if _fused(q) and grad_lse is None:
        heads = _Heads.of(q, call)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *map(heads.merge, (grad, q, k, v, out, lse)), 0.0, call.causal, attn_mask=heads.bias(q, call), scale=scale
        )
        return heads.split(dq), heads.split_keys(dk), heads.split_keys(dv)
    dtype = compute_dtype(q)
    delta = (grad.to(dtype) * out.to(dtype)).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    # Per query head, [B, Hkv, group, Lk, D]
    dk, dv = (torch.zeros(*q.shape[:3], *x.shape[3:], dtype=dtype, device=x.device) for x in (k, v))
    dqs = []
    for rows, keys in _chunks(q, k, call.causal):
        p = torch.exp(_scores(q[..., rows, :], k[..., keys, :], scale, call, rows, keys) - lse[..., rows, None])
        g = grad[..., rows, :].to(dtype)
        dv[..., keys, :] += p.transpose(-1, -2) @ g
        dp = g @ v[..., keys, :].to(dtype).transpose(-1, -2)
        ds = p * (dp - delta[..., rows, None]) * scale
        dqs.append(ds @ k[..., keys, :].to(dtype))
        dk[..., keys, :] += ds.transpose(-1, -2) @ q[..., rows, :].to(dtype)
    return torch.cat(dqs, dim=3), dk.sum(2, keepdim=True), dv.sum(2, keepdim=True)


def _chunks(q: Tensor, k: Tensor, causal: bool) -> Iterator[tuple[slice, slice]]:
    """Runs of query rows whose scores fit into CHUNK_SCORES, each with the keys it can see."""
    length, keys = q.shape[3], k.shape[3]
    step = max(1, CHUNK_SCORES // (math.prod(q.shape[:3]) * keys))
    for begin in range(0, length, step):
        end = min(begin + step, length)
        yield slice(begin, end), slice(0, end if causal else keys)


def _scores(q: Tensor, k: Tensor, scale: float, call: Call, rows: slice, keys: slice) -> Tensor:
    """Scaled, masked scores of a chunk in full precision [B, Hkv, group, rows, keys]."""
    dtype = compute_dtype(q)
    scores = q.to(dtype) @ k.to(dtype).transpose(-1, -2) * scale
    if call.causal:
        query, key = (torch.arange(s.start, s.stop, device=q.device) for s in (rows, keys))
        scores.masked_fill_(key[None, :] > query[:, None], float("-inf"))
    elif call.mask is not None:
        scores.masked_fill_(~call.mask[:, None, None, rows, keys], float("-inf"))
    return scores
