"""What attention is compared with: PyTorch's ways, varlen FlashAttention, MagiAttention, and cuDNN as a ceiling.

A peer takes a setting once and does there what a training step does once per pack (building masks or index lists),
and may bring its inputs into the layout that it likes best: neither is timed, unless its name says so.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from unigendet.layout import CAUSAL, NOISE, SPLIT_FIELDS, Layout, visible
from unigendet.ops import symbiotic_attention_flash as flash

from .candidate import Candidate, raise_if_not_cuda
from .harness import CannotRun
from .stream_case import library
from .traces import Trace

MOST_COMPILED_SAMPLES = 32
LARGEST_SCORES_GIB = 12  # of a peer that keeps them for its backward pass, on a GPU


@dataclass(frozen=True)
class Setting:
    """A pack and the shape of the attention that runs over it."""

    trace: Trace
    device: torch.device
    heads: int
    kv_heads: int
    head_dim: int

    @functools.cached_property
    def layout(self) -> Layout:
        """The trace's, on ``device``: there once somebody asks."""
        return self.trace.layout.to(self.device)

    @property
    def scale(self) -> float:
        """Of the scores."""
        return self.head_dim**-0.5


Peer = Callable[[Setting], Candidate]


def to_batch(x: Tensor) -> Tensor:
    """[T, heads, D] to [1, heads, T, D]."""
    return x.transpose(0, 1).unsqueeze(0).contiguous()


def from_batch(x: Tensor) -> Tensor:
    """[1, heads, T, D] to [T, heads, D]."""
    return x.squeeze(0).transpose(0, 1)


def _samples(setting: Setting) -> tuple[list[int], list[Tensor]]:
    """The samples' lengths and dense bool masks."""
    masks = [Layout.from_splits([splits]).to(setting.device).dense_mask() for splits in setting.trace.splits]
    return [len(mask) for mask in masks], masks


def eager(setting: Setting) -> Candidate:
    """Sample by sample: scores, mask, softmax, product. kv heads are repeated."""
    squares = sum(n * n for n in setting.trace.layout.cu_seqlens_q.diff().tolist())
    scores_gib = 2 * setting.heads * squares / 2**30
    if setting.device.type == "cuda" and scores_gib > LARGEST_SCORES_GIB:
        raise CannotRun(f"its scores alone take {scores_gib:.0f} GiB in bfloat16")
    lengths, masks = _samples(setting)
    group = setting.heads // setting.kv_heads

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        samples = zip(*(x.transpose(0, 1).split(lengths, 1) for x in (q, k, v)), masks, strict=True)
        outs = []
        for sample_q, sample_k, sample_v, mask in samples:
            scores = (sample_q @ sample_k.transpose(1, 2) * setting.scale).masked_fill(~mask, float("-inf"))
            outs.append(scores.softmax(-1) @ sample_v)
        return torch.cat(outs, 1).transpose(0, 1)

    return Candidate(attend)


def compiled_eager(setting: Setting) -> Candidate:
    """``eager`` under torch.compile."""
    samples = setting.layout.num_samples
    if samples > MOST_COMPILED_SAMPLES:
        raise CannotRun(f"{samples} samples of different lengths would be compiled one by one")
    return Candidate(torch.compile(eager(setting).function, dynamic=False))


def sdpa_dense_mask(setting: Setting) -> Candidate:
    """Sample by sample with a dense additive mask and repeated kv heads: how the published code runs by default."""
    lengths, masks = _samples(setting)
    group, on_gpu = setting.heads // setting.kv_heads, setting.device.type == "cuda"
    biases: dict[torch.dtype, list[Tensor]] = {}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.dtype not in biases:
            zeros = [torch.zeros(mask.shape, device=q.device, dtype=q.dtype) for mask in masks]
            biases[q.dtype] = [z.masked_fill_(~mask, float("-inf")) for z, mask in zip(zeros, masks, strict=True)]
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        samples = zip(*(x.transpose(0, 1).split(lengths, 1) for x in (q, k, v)), biases[q.dtype], strict=True)
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION) if on_gpu else contextlib.nullcontext():
            outs = [
                F.scaled_dot_product_attention(*(x[None] for x in sample), attn_mask=bias) for *sample, bias in samples
            ]
        return torch.cat(outs, 2)[0].transpose(0, 1)

    return Candidate(attend)


def flex(*, mask_per_pack: bool = False, backend: str | None = None) -> Peer:
    """PyTorch's FlexAttention, compiled, with this project's mask of two integers per key as its mask function."""

    def setup(setting: Setting) -> Candidate:
        from torch.nn.attention import flex_attention as module

        if backend is not None and backend not in typing.get_args(getattr(module, "_Backend", None)):
            raise CannotRun(f"this PyTorch's FlexAttention has no backend {backend}")
        if backend is not None:
            raise_if_not_cuda(setting.device)
        query_begin, query_end = setting.layout.query_begin, setting.layout.query_end
        tokens = setting.layout.num_queries

        def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return visible(query, query_begin[key], query_end[key])

        compiled, build_mask = (
            torch.compile(f, dynamic=False) for f in (module.flex_attention, module.create_block_mask)
        )
        options = None if backend is None else {"BACKEND": backend}

        def build() -> object:
            return build_mask(mask_mod, None, None, tokens, tokens, device=setting.device)

        built = build()

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            mask = build() if mask_per_pack else built
            return compiled(q, k, v, block_mask=mask, enable_gqa=True, kernel_options=options)

        return Candidate(
            attend,
            to_batch,
            from_batch,
            inseparable="the mask is built in the forward pass; see the other directions" if mask_per_pack else None,
            forward_only=None if setting.device.type == "cuda" else "FlexAttention has no backward pass on CPUs",
        )

    return setup


def _call_flash_attention(function: Callable[..., typing.Any]) -> Callable[..., Tensor]:
    """The signature that FlashAttention 2, 3 and 4 share; some versions return more than the output."""

    def run(q: Tensor, k: Tensor, v: Tensor, call: flash.Call, scale: float) -> Tensor:
        lengths = (call.cu_seqlens_q, call.cu_seqlens_k, call.max_seqlen_q, call.max_seqlen_k)
        out = function(q, k, v, *lengths, softmax_scale=scale, causal=call.causal)
        return out[0] if isinstance(out, tuple) else out

    return run


def _call_torch_varlen(function: Callable[..., typing.Any]) -> Callable[..., Tensor]:
    # Releases differ in whether grouped heads must be announced.
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(function).parameters else {}

    def run(q: Tensor, k: Tensor, v: Tensor, call: flash.Call, scale: float) -> Tensor:
        lengths = (call.cu_seqlens_q, call.cu_seqlens_k, call.max_seqlen_q, call.max_seqlen_k)
        window = (-1, 0) if call.causal else (-1, -1)
        return function(q, k, v, *lengths, scale=scale, window_size=window, **grouped)

    return run


def varlen(name: str, module: str, attribute: str, adapt: Callable[..., Callable[..., Tensor]]) -> Peer:
    """A varlen FlashAttention as a project would use it: the mask as two calls over gathered keys, under autograd."""

    def setup(setting: Setting) -> Candidate:
        run = adapt(library(name, module, attribute, setting.device))
        calls = flash.plan(setting.layout.splits, setting.device)
        every = torch.arange(setting.layout.num_queries, device=setting.device)
        places = torch.cat([every[call.query_rows] for call in calls]).argsort()  # of each row in the calls' outputs

        def take(x: Tensor, rows: slice | Tensor) -> Tensor:
            return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys = [(take(k, call.key_rows), take(v, call.key_rows)) for call in calls]
            outs = [
                run(take(q, call.query_rows), *kv, call, setting.scale) for call, kv in zip(calls, keys, strict=True)
            ]
            return outs[0] if len(outs) == 1 else torch.cat(outs).index_select(0, places)

        return Candidate(attend)

    return setup


def magi_ranges(layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """The mask as MagiAttention's slices: query ranges and key ranges int32 [n, 2], and types int32 [n], 1 = causal.

    Each split's queries see ranges of earlier keys whole, then their own split whole or lower-right causal.
    """
    queries, keys, types = [], [], []
    before: list[tuple[int, int]] = []
    sample = None
    for mode, begin, end, first, _, query_begin, query_end in layout.splits.view(-1, len(SPLIT_FIELDS)).tolist():
        if first != sample:
            sample, before = first, []
        for key_range in before:
            queries.append((query_begin, query_end))
            keys.append(key_range)
            types.append(0)
        queries.append((query_begin, query_end))
        keys.append((begin, end))
        types.append(int(mode == CAUSAL))
        if mode != NOISE and before and before[-1][1] == begin:
            before[-1] = (before[-1][0], end)
        elif mode != NOISE:
            before.append((begin, end))
    return tuple(torch.tensor(x, dtype=torch.int32) for x in (queries, keys, types))


def magi(setting: Setting) -> Candidate:
    """MagiAttention's kernel on one device. Slices that share queries add to one output."""
    function = library("MagiAttention", "magi_attention.api", "flex_flash_attn_func", setting.device)
    ranges = [x.to(setting.device) for x in magi_ranges(setting.layout)]
    lengths = {}
    if "max_seqlen_k" in inspect.signature(function).parameters:  # releases before 1.1 want them
        most = [int((r[:, 1] - r[:, 0]).max()) for r in ranges[:2]]
        lengths = {"max_seqlen_q": most[0], "max_seqlen_k": most[1]}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q_ranges, k_ranges, types = ranges
        return function(q, k, v, q_ranges, k_ranges, attn_type_map=types, softmax_scale=setting.scale, **lengths)[0]

    return Candidate(attend)


def cudnn_dense(setting: Setting, *, causal: bool) -> Candidate:
    """cuDNN over one unmasked or causal sequence, every query head with a kv head of its own: the machine's ceiling."""
    raise_if_not_cuda(setting.device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return Candidate(attend, to_batch, from_batch)


PEERS: dict[str, Peer] = {
    "eager": eager,
    "torch.compile": compiled_eager,
    "sdpa_dense_mask": sdpa_dense_mask,
    "flex": flex(),
    "flex_mask_per_pack": flex(mask_per_pack=True),
    "flex_flash4": flex(backend="FLASH"),
    "flex_cudnn": flex(backend="CUDNN"),
    "torch_varlen": varlen("torch", "torch.nn.attention.varlen", "varlen_attn", _call_torch_varlen),
    "flash_attn2": varlen("flash-attn", "flash_attn", "flash_attn_varlen_func", _call_flash_attention),
    "flash_attn3": varlen("flash-attn 3", "flash_attn_interface", "flash_attn_varlen_func", _call_flash_attention),
    "flash_attn4": varlen("flash-attn 4", "flash_attn.cute", "flash_attn_varlen_func", _call_flash_attention),
    "magi": magi,
}
