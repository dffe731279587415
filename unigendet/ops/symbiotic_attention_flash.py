"""The ``flash`` backend of ``symbiotic_attention``: the mask as two calls of varlen FlashAttention, exactly.

FlashAttention knows two masks per problem: everything, and causal aligned to the lower right corner. They suffice:

* the queries of a ``full`` or ``noise`` split see all keys of one list: the visible ones before the split, then the
  split's own. All such splits of a pack are the problems of one non-causal call;
* the queries of a ``causal`` split see the same kind of list up to themselves, which is lower-right causal. Causal
  splits with nothing but ``noise`` splits between them continue one list and are one problem. All are one causal call.

Keys that several splits see are gathered several times; where a call's rows are consecutive, nothing is gathered. The
row lists follow from ``Layout.splits`` alone and are kept for the last packs seen, as in the ``torch`` backend.

Gradients of a key that occurs several times are summed in float32, in a fixed order. The libraries' own backward is
deterministic only under ``torch.use_deterministic_algorithms(True)``. None of them has a gradient through lse.

The decomposition is tested against the definition with a plain function in a library's place. The calls to the
libraries have never run on hardware.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unigendet.layout import CAUSAL, NOISE, SPLIT_FIELDS
from unigendet.ops._arguments import compute_dtype

Range = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Call:
    """One varlen call of P problems. Rows are a slice or an int32 index, the problems' rows one after the other."""

    causal: bool  # lower-right aligned; else every query of a problem sees every key of it
    query_rows: slice | Tensor
    key_rows: slice | Tensor
    cu_seqlens_q: Tensor  # int32 [P+1]
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    # Where key_rows is an index: (rows, their places in it), int32, such that no row occurs twice in a round.
    rounds: tuple[tuple[Tensor, Tensor], ...] = ()


@dataclass(frozen=True)
class Library:
    """A varlen FlashAttention. q, out [rows, Hq, D], k, v [key rows, Hkv, D], lse [Hq, rows]; no empty problems."""

    name: str
    forward: Callable[[Tensor, Tensor, Tensor, Call, float], tuple[Tensor, Tensor]]  # q, k, v → out, lse
    # grad_out, q, k, v, out, lse → dq, dk, dv
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Call, float], tuple[Tensor, Tensor, Tensor]]


def plan(splits: Tensor, device: torch.device) -> tuple[Call, ...]:
    """The calls for a pack, one or two, with their index lists on ``device``. ``splits``: ``Layout.splits``."""
    return _plan(splits.numpy().tobytes(), device)


@functools.lru_cache(maxsize=64)
def _plan(table: bytes, device: torch.device) -> tuple[Call, ...]:
    splits = np.frombuffer(table, np.int64).reshape(-1, len(SPLIT_FIELDS))
    samples = np.split(splits, np.flatnonzero(np.diff(splits[:, 3])) + 1)
    problems = [problem for rows in samples for problem in _problems(rows)]
    groups = ([p for p in problems if p.causal == causal] for causal in (False, True))
    return tuple(_call(group, device) for group in groups if group)


@dataclass
class _Problem:
    causal: bool
    queries: list[Range]
    keys: list[Range]


def _problems(splits: np.ndarray) -> Iterator[_Problem]:
    """The problems of one sample (rows of ``Layout.splits``), none of them empty."""
    before: list[Range] = []  # keys before the split that its queries see
    texts: _Problem | None = None  # the causal problem that a causal split would continue
    for mode, key_begin, key_end, _, _, query_begin, query_end in splits.tolist():
        queries, keys = (query_begin, query_end), (key_begin, key_end)
        if query_begin == query_end:
            pass  # wholly cached
        elif mode != CAUSAL:
            yield _Problem(False, [queries], [*before, keys])
        elif texts is not None:
            texts.queries.append(queries)
            texts.keys.append(keys)
        else:
            texts = _Problem(True, [queries], [*before, keys])
        if mode != NOISE:
            before.append(keys)
            if mode != CAUSAL and texts is not None:
                yield texts
                texts = None
    if texts is not None:
        yield texts


def _call(problems: list[_Problem], device: torch.device) -> Call:
    query_rows, cu_seqlens_q = _rows([p.queries for p in problems])
    key_rows, cu_seqlens_k = _rows([p.keys for p in problems])
    to_device = lambda array: torch.from_numpy(array.astype(np.int32)).to(device)  # noqa: E731
    queries, keys = _as_slice(query_rows), _as_slice(key_rows)
    return Call(
        causal=problems[0].causal,
        query_rows=to_device(query_rows) if queries is None else queries,
        key_rows=to_device(key_rows) if keys is None else keys,
        cu_seqlens_q=to_device(cu_seqlens_q),
        cu_seqlens_k=to_device(cu_seqlens_k),
        max_seqlen_q=int(np.diff(cu_seqlens_q).max()),
        max_seqlen_k=int(np.diff(cu_seqlens_k).max()),
        rounds=tuple((to_device(r), to_device(places)) for r, places in _rounds(key_rows)) if keys is None else (),
    )


def _rows(problems: list[list[Range]]) -> tuple[np.ndarray, np.ndarray]:
    """All rows of the problems, and where each problem's begin [P+1]."""
    rows = np.concatenate([np.arange(*r) for ranges in problems for r in ranges])
    lengths = [sum(end - begin for begin, end in ranges) for ranges in problems]
    return rows, np.concatenate(([0], np.cumsum(lengths)))


def _as_slice(rows: np.ndarray) -> slice | None:
    return slice(int(rows[0]), int(rows[-1]) + 1) if (np.diff(rows) == 1).all() else None


def _rounds(rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rounds in which every row is added to once at most, so that its sum has one order: (rows, their places)."""
    places = np.argsort(rows, kind="stable")
    ordered = rows[places]
    first = np.searchsorted(ordered, ordered)
    occurrence = np.arange(len(rows)) - first  # of each entry, among those of its row
    for i in range(int(occurrence.max()) + 1):
        yield ordered[occurrence == i], places[occurrence == i]


def forward(q: Tensor, k: Tensor, v: Tensor, splits: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output [T, Hq, D] and lse [Hq, T] in sequence order. Shapes as in ``symbiotic_attention``."""
    flash, calls = _library_for(q, scale), plan(splits, q.device)
    q, k, v = (_aligned(x) for x in (q, k, v))
    if len(calls) == 1:  # all queries, in order
        out, lse = flash.forward(q, _take(k, calls[0].key_rows), _take(v, calls[0].key_rows), calls[0], scale)
        return out.contiguous(), lse.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=compute_dtype(q), device=q.device)
    for call in calls:
        keys, values = _take(k, call.key_rows), _take(v, call.key_rows)
        part, part_lse = flash.forward(_take(q, call.query_rows), keys, values, call, scale)
        out[call.query_rows] = part
        lse[:, call.query_rows] = part_lse
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
    """Gradients of q, k, v; everything in sequence order. Keys that nobody sees get zeros.

    Raises ValueError for a gradient through lse: FlashAttention has none.
    """
    if grad_lse is not None:
        raise ValueError(
            "backend='flash' cannot run symbiotic_attention with a gradient through lse: FlashAttention does not have "
            "it; backend='triton' and backend='torch' do"
        )
    flash, calls = _library_for(q, scale), plan(splits, q.device)
    grad_out, q, k, v = (_aligned(x) for x in (grad_out, q, k, v))
    if len(calls) == 1 and isinstance(calls[0].key_rows, slice) and calls[0].key_rows == slice(0, k.shape[0]):
        return tuple(x.contiguous() for x in flash.backward(grad_out, q, k, v, out, lse, calls[0], scale))
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.zeros(x.shape, dtype=compute_dtype(x), device=x.device) for x in (k, v))
    for call in calls:
        query = functools.partial(_take, rows=call.query_rows)
        key = functools.partial(_take, rows=call.key_rows)
        part_lse = _take(lse.T, call.query_rows).T.contiguous()
        gq, gk, gv = flash.backward(query(grad_out), query(q), key(k), key(v), query(out), part_lse, call, scale)
        dq[call.query_rows] = gq
        _accumulate(dk, call, gk)
        _accumulate(dv, call, gv)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _library_for(q: Tensor, scale: float) -> Library:
    if not scale > 0:  # the kernels take the maximum of the unscaled scores
        raise ValueError(f"scale is {scale}; backend='flash' needs a positive one")
    return library(q.device)


def _aligned(x: Tensor) -> Tensor:
    """x with rows that start at multiples of 16 bytes, which the libraries load at a time."""
    step = 16 // x.element_size()
    fits = x.stride(-1) == 1 and all(s % step == 0 for s in x.stride()[:-1]) and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _take(x: Tensor, rows: slice | Tensor) -> Tensor:
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)


def _accumulate(total: Tensor, call: Call, part: Tensor) -> None:
    if isinstance(call.key_rows, slice):
        total[call.key_rows] += part
    for rows, places in call.rounds:
        total.index_add_(0, rows, part.index_select(0, places).to(total.dtype))


@functools.cache
def library(device: torch.device) -> Library:
    """The library that runs on ``device``: FlashAttention 3 if installed (sm_90), else 2 if installed, else PyTorch's.

    A library that is installed but broken raises its ImportError: which one runs must not depend on an accident.
    """
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        raise ValueError(f"backend='flash' needs compute capability 8.0 or later; {device} has {capability}")
    if capability == (9, 0) and _installed("flash_attn_interface"):
        return _flash_attention_3()
    if _installed("flash_attn"):
        return _flash_attention_2()
    return Library(f"torch {torch.__version__}", _pytorch_forward, _pytorch_backward)


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _lengths(call: Call) -> dict[str, Tensor | int]:
    return {name: getattr(call, name) for name in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")}


def _flash_attention_3() -> Library:
    """Package ``flash_attn_interface``; its operators are called by the names in their schema."""
    importlib.import_module("flash_attn_interface")
    ops = torch.ops.flash_attn_3

    def forward(q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float) -> tuple[Tensor, Tensor]:
        # One split of the keys: with several the order of summation depends on the other problems of the call.
        out, lse, *_ = ops.fwd(q, k, v, **_lengths(call), softmax_scale=scale, is_causal=call.causal, num_splits=1)
        return out, lse

    def backward(
        grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        options = {"softmax_scale": scale, "is_causal": call.causal, "deterministic": _deterministic()}
        ops.bwd(grad_out, q, k, v, out, lse, dq=dq, dk=dk, dv=dv, **_lengths(call), **options)
        return dq, dk, dv

    return Library("flash_attn 3", forward, backward)


def _flash_attention_2() -> Library:
    """Package ``flash_attn``, 2.7 or later (earlier ones name their arguments otherwise)."""
    module = importlib.import_module("flash_attn.flash_attn_interface")

    def forward(q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float) -> tuple[Tensor, Tensor]:
        options = {"dropout_p": 0.0, "softmax_scale": scale, "causal": call.causal}
        out, lse, *_ = module._flash_attn_varlen_forward(q, k, v, **_lengths(call), **options)
        return out, lse

    def backward(
        grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        options = {"dropout_p": 0.0, "softmax_scale": scale, "causal": call.causal, "deterministic": _deterministic()}
        options |= {"window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None}
        module._flash_attn_varlen_backward(grad_out, q, k, v, out, lse, dq, dk, dv, **_lengths(call), **options)
        return dq, dk, dv

    return Library(f"flash_attn {importlib.import_module('flash_attn').__version__}", forward, backward)


def _pytorch_forward(q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float) -> tuple[Tensor, Tensor]:
    """The operator behind ``torch.nn.attention.varlen``, whose public function hides the backward."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *_lengths(call).values(), 0.0, call.causal, False, scale=scale
    )
    return out, lse


def _pytorch_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    # Without dropout the state of the random generator is not read.
    state, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        grad_out, q, k, v, out, lse, *_lengths(call).values(), 0.0, call.causal, state, unused, scale=scale
    )


def _deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled()
