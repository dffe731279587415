"""What the attention benchmark compares: the backends of ``symbiotic_attention``, its peers, and cuDNN as a ceiling.

A candidate takes a case once (building masks, say) and then sets of inputs, which it may bring into the layout that it
likes best: neither is timed. What each training step would have to do is.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import CannotRun
from benchmarks.traces import Trace
from unigendet.layout import Layout, visible
from unigendet.ops import symbiotic_attention
from unigendet.ops.backends import resolve


@dataclass(frozen=True)
class Inputs:
    """q, grad_out [T, Hq, D] and k, v [T, Hkv, D], in sequence order, without gradients."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor


@dataclass(frozen=True)
class Case:
    """A trace with the shape of the attention that runs over it. ``layout`` is on ``device``."""

    trace: Trace
    device: torch.device
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    layout: Layout = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layout", self.trace.layout.to(self.device))

    def inputs(self, seed: int) -> Inputs:
        """Random numbers of the standard normal distribution."""
        generator = torch.Generator(self.device).manual_seed(seed)
        shapes = [(self.layout.num_queries, h, self.head_dim) for h in (self.heads, self.kv_heads)]
        make = lambda shape: torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)  # noqa: E731
        return Inputs(make(shapes[0]), make(shapes[1]), make(shapes[1]), make(shapes[0]))


@dataclass(frozen=True)
class Prepared:
    """One set of inputs in a candidate's own layout; ``standard`` brings outputs and gradients to [T, heads, D]."""

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, Tensor, Tensor]
    grad: Tensor
    standard: Callable[[Tensor], Tensor] = lambda x: x
    masks_in_forward: bool = False

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        """Gradients of the leaves; may be called again."""
        return torch.autograd.grad(out, self.leaves, self.grad, retain_graph=True)

    def both(self) -> tuple[Tensor, ...]:
        """Forward and backward."""
        return torch.autograd.grad(self.forward(), self.leaves, self.grad)


Candidate = Callable[[Case], Callable[[Inputs], Prepared]]


def _leaves(inputs: Inputs, to_own: Callable[[Tensor], Tensor] = lambda x: x) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(to_own(x).detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))


def _ours(backend: str, **options: object) -> Candidate:
    """A backend of the op itself."""

    def setup(case: Case) -> Callable[[Inputs], Prepared]:
        unknown = options.keys() - inspect.signature(symbiotic_attention).parameters.keys()
        if unknown:
            raise CannotRun(f"symbiotic_attention has no argument {', '.join(sorted(unknown))}")
        probe = torch.empty(1, case.heads, case.head_dim, device=case.device, dtype=case.dtype)
        try:
            resolve("symbiotic_attention", backend, probe)
        except ValueError as error:
            raise CannotRun(str(error)) from error

        def prepare(inputs: Inputs) -> Prepared:
            q, k, v = leaves = _leaves(inputs)
            call = functools.partial(symbiotic_attention, q, k, v, case.layout, backend=backend, **options)
            return Prepared(call, leaves, inputs.grad)

        return prepare

    return setup


def _flex(*, mask_per_pack: bool) -> Candidate:
    """PyTorch's FlexAttention, compiled, with this project's mask of two integers per key as its mask function."""

    def setup(case: Case) -> Callable[[Inputs], Prepared]:
        if case.device.type != "cuda":
            raise CannotRun("its compiled kernels are compared on CUDA devices only")
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        query_begin, query_end = case.layout.query_begin, case.layout.query_end
        tokens = case.layout.num_queries

        def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return visible(query, query_begin[key], query_end[key])

        # Backward is timed alone, on one graph again and again, which may then not give its buffers away.
        torch._functorch.config.donated_buffer = False
        compiled, build_mask = (torch.compile(f, dynamic=False) for f in (flex_attention, create_block_mask))

        def build() -> object:
            return build_mask(mask_mod, None, None, tokens, tokens, device=case.device)

        built = build()
        own = lambda x: x.transpose(0, 1).unsqueeze(0).contiguous()  # noqa: E731  # [1, heads, T, D]

        def prepare(inputs: Inputs) -> Prepared:
            q, k, v = leaves = _leaves(inputs, own)

            def forward() -> Tensor:
                return compiled(q, k, v, block_mask=build() if mask_per_pack else built, enable_gqa=True)

            return Prepared(
                forward,
                leaves,
                own(inputs.grad),
                standard=lambda x: x.squeeze(0).transpose(0, 1),
                masks_in_forward=mask_per_pack,
            )

        return prepare

    return setup


def _sdpa_dense_mask(case: Case) -> Callable[[Inputs], Prepared]:
    """Sample by sample with a dense additive mask and repeated kv heads: how the published code runs by default."""
    lengths = case.layout.cu_seqlens_q.diff().tolist()
    masks = []
    for splits in case.trace.splits:
        mask = Layout.from_splits([splits]).to(case.device).dense_mask()
        masks.append(torch.zeros(mask.shape, device=case.device, dtype=case.dtype).masked_fill_(~mask, float("-inf")))
    group = case.heads // case.kv_heads
    on_gpu = case.device.type == "cuda"

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        samples = zip(*(x.transpose(0, 1).split(lengths, 1) for x in (q, k, v)), masks, strict=True)
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION) if on_gpu else contextlib.nullcontext():
            outs = [F.scaled_dot_product_attention(*(x[None] for x in sample)) for sample in samples]
        return torch.cat(outs, 2)[0].transpose(0, 1)

    def prepare(inputs: Inputs) -> Prepared:
        leaves = _leaves(inputs)
        return Prepared(functools.partial(attend, *leaves), leaves, inputs.grad)

    return prepare


CANDIDATES: dict[str, Candidate] = {
    "triton": _ours("triton"),
    "triton_atomic": _ours("triton", deterministic=False),
    "flash": _ours("flash"),
    "torch": _ours("torch"),
    "flex": _flex(mask_per_pack=False),
    "flex_mask_per_pack": _flex(mask_per_pack=True),
    "sdpa_dense_mask": _sdpa_dense_mask,
}
PEERS = ("flex", "flex_mask_per_pack", "sdpa_dense_mask")


def cudnn_dense(case: Case, *, causal: bool) -> Callable[[Inputs], Prepared]:
    """cuDNN over one unmasked or causal sequence, every query head with a kv head of its own: the machine's ceiling."""
    if case.device.type != "cuda":
        raise CannotRun("cuDNN needs a CUDA device")
    own = lambda x: x.transpose(0, 1).unsqueeze(0).contiguous()  # noqa: E731  # [1, heads, T, D]

    def prepare(inputs: Inputs) -> Prepared:
        q, k, v = leaves = _leaves(inputs, own)

        def forward() -> Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

        return Prepared(forward, leaves, own(inputs.grad), standard=lambda x: x.squeeze(0).transpose(0, 1))

    return prepare
