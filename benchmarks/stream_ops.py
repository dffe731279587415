"""The ops between the matrix products, and the products themselves: ``python -m benchmarks.stream_ops``.

``rms_norm`` (residual add and norm, two streams), ``swiglu``, ``flow_matching``, ``flow_matching_loss`` and
``stream_linear``, each forward and backward; at BAGEL-7B's sizes in bfloat16 on GPUs, at small ones in float32 on CPUs.
Peers: PyTorch written the published way (a gather, a product and a scatter per stream), eager and under torch.compile;
Liger-Kernel where it can do the same or less (one weight for both streams); a grouped matrix product for
``stream_linear``.

``pytest benchmarks/stream_ops.py`` shows the same competitors with pytest-benchmark.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bandwidth import PLAIN, Case, Function, compiled, main, ours, outputs_and_gradients
from benchmarks.harness import CannotRun
from unigendet.ops import (
    LatentGrids,
    flow_matching,
    flow_matching_loss,
    rms_norm,
    stream_linear,
    swiglu,
)

BACKENDS = dict.fromkeys(("rms_norm", "swiglu", "flow_matching", "flow_matching_loss"), ("torch", "triton"))
BACKENDS["stream_linear"] = ("torch",)  # cuBLAS on GPUs
EPS = 1e-6
PATCH, CHANNELS = 2, 16  # BAGEL's latents


def _streams(rows: int) -> tuple[SimpleNamespace, int]:
    """The part of a Layout that these ops read, with a third of the rows in the generation stream."""
    understanding = rows - rows // 3
    return SimpleNamespace(stream_lengths=torch.tensor([understanding, rows - understanding])), understanding


def _random(device: torch.device, dtype: torch.dtype, seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, device=device, dtype=dtype)


def _candidates(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    eager: Function,
    own: Callable[..., Any],
    more: Mapping[str, Callable[[], Function]] | None = None,
) -> dict[str, Any]:
    """Candidates and peers: eager, compiled, others' kernels, and our backends."""
    peers = {PLAIN: lambda: eager, "torch.compile": compiled(eager), **(more or {})}
    backends = {b: ours(op, b, device, dtype, partial(own, backend=b)) for b in BACKENDS[op]}
    return {"candidates": peers | backends, "peers": frozenset(peers)}


def _liger(module: str, name: str) -> Any:
    """An autograd function of Liger-Kernel."""
    try:
        return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name)
    except ImportError as error:
        raise CannotRun(f"liger-kernel: {error}") from error


def norm_case(device: torch.device, dtype: torch.dtype, rows: int, columns: int) -> Case:
    """Residual add and norm. The published way gathers each stream, norms it, and scatters into a zeroed buffer."""
    layout, n = _streams(rows)
    und, gen = torch.arange(n, device=device), torch.arange(n, rows, device=device)

    def inputs(seed: int) -> tuple[Tensor, ...]:
        make = _random(device, dtype, seed)
        return tuple(
            x.requires_grad_() for x in (make(rows, columns), make(rows, columns), make(columns), make(columns))
        )

    def own(x: Tensor, residual: Tensor, weight_und: Tensor, weight_gen: Tensor, backend: str) -> tuple[Tensor, ...]:
        return rms_norm(x, (weight_und, weight_gen), layout, residual=residual, eps=EPS, backend=backend)

    def eager(x: Tensor, residual: Tensor, weight_und: Tensor, weight_gen: Tensor) -> tuple[Tensor, Tensor]:
        summed = x + residual
        wide = summed.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        h = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)
        normed = torch.zeros_like(h)
        normed[und] = weight_und * h[und]
        normed[gen] = weight_gen * h[gen]
        return normed, summed

    def liger() -> Function:
        function = _liger("fused_add_rms_norm", "LigerFusedAddRMSNormFunction")
        raise_if_not_cuda(device)
        return lambda x, residual, weight, _: function.apply(x, residual, weight, EPS, 0.0, "llama", False)

    size = dtype.itemsize * rows * columns
    work = {"forward": 4 * size, "backward": 4 * size}  # x, r, y, s; dy, ds, s and the result
    more = {"liger (one weight)": liger}
    exact = partial(own, backend="reference")
    shape = f"{rows} x {columns}"
    return Case(
        "rms_norm", shape, dtype, inputs, work, **_candidates("rms_norm", device, dtype, eager, own, more), exact=exact
    )


def raise_if_not_cuda(device: torch.device) -> None:
    """For peers that have nothing for CPUs."""
    if device.type != "cuda":
        raise CannotRun("needs a CUDA device")


def swiglu_case(device: torch.device, dtype: torch.dtype, rows: int, width: int) -> Case:
    """On the fused projection; Liger-Kernel takes its two halves."""

    def inputs(seed: int) -> tuple[Tensor]:
        return (_random(device, dtype, seed)(rows, 2 * width).requires_grad_(),)

    def eager(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=1)
        return F.silu(gate) * up

    def liger() -> Function:
        function = _liger("swiglu", "LigerSiLUMulFunction")
        raise_if_not_cuda(device)
        return lambda gate_up: function.apply(*(x.contiguous() for x in gate_up.chunk(2, dim=1)))

    size = dtype.itemsize * rows * width
    chosen = _candidates("swiglu", device, dtype, eager, swiglu, {"liger (halves copied)": liger})
    work = {"forward": 3 * size, "backward": 5 * size}
    exact = partial(swiglu, backend="reference")
    return Case("swiglu", f"{rows} x 2*{width}", dtype, inputs, work, **chosen, exact=exact)


def noising_case(device: torch.device, dtype: torch.dtype, sizes: list[tuple[int, int]]) -> Case:
    """Latents need no gradient in training: forward only. The published way goes image by image."""
    grids, features = LatentGrids.from_sizes(sizes), PATCH * PATCH * CHANNELS

    def inputs(seed: int) -> tuple[Tensor, ...]:
        make = _random(device, dtype, seed)
        return make(grids.rows * features), make(grids.rows, features), make(len(sizes)).float().sigmoid()

    def own(latents: Tensor, noise: Tensor, timesteps: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        sizes = {"patch_size": PATCH, "channels": CHANNELS}
        return flow_matching(latents, noise, timesteps, grids, **sizes, backend=backend)

    def eager(latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        tokens, start = [], 0
        for h, w in sizes:
            image = latents[start : start + h * w * features].view(CHANNELS, h, PATCH, w, PATCH)
            tokens.append(torch.einsum("chpwq->hwpqc", image).reshape(h * w, features))
            start += h * w * features
        clean = torch.cat(tokens)
        counts = torch.tensor([h * w for h, w in sizes], device=device)
        t = timesteps.repeat_interleave(counts, output_size=len(clean))[:, None].to(clean.dtype)
        return (1 - t) * clean + t * noise, noise - clean

    work = {"forward": 4 * dtype.itemsize * grids.rows * features}
    chosen = _candidates("flow_matching", device, dtype, eager, own)
    shape, exact = f"{len(sizes)} images, {grids.rows} x {features}", partial(own, backend="reference")
    return Case("flow_matching", shape, dtype, inputs, work, **chosen, exact=exact)


def error_case(device: torch.device, dtype: torch.dtype, rows: int, columns: int) -> Case:
    """The prediction wants a gradient, the target none."""

    def inputs(seed: int) -> tuple[Tensor, Tensor]:
        make = _random(device, dtype, seed)
        return make(rows, columns).requires_grad_(), make(rows, columns)

    def eager(prediction: Tensor, target: Tensor) -> Tensor:
        wide = torch.float64 if target.dtype == torch.float64 else torch.float32
        return (prediction.to(wide) - target.to(wide)).square().mean(-1)

    size = dtype.itemsize * rows * columns
    chosen = _candidates("flow_matching_loss", device, dtype, eager, flow_matching_loss)
    work = {"forward": 2 * size + 4 * rows, "backward": 3 * size + 4 * rows}
    exact = partial(flow_matching_loss, backend="reference")
    return Case("flow_matching_loss", f"{rows} x {columns}", dtype, inputs, work, **chosen, exact=exact)


def linear_case(device: torch.device, dtype: torch.dtype, rows: int, columns: int, out: int) -> Case:
    """Two products into one buffer, against gathers and scatters, and against one grouped product."""
    layout, n = _streams(rows)
    und, gen = torch.arange(n, device=device), torch.arange(n, rows, device=device)
    ends = torch.tensor([n, rows], dtype=torch.int32, device=device)

    def inputs(seed: int) -> tuple[Tensor, Tensor]:
        make = _random(device, dtype, seed)
        return make(rows, columns).requires_grad_(), (make(2, out, columns) * columns**-0.5).requires_grad_()

    def own(x: Tensor, weights: Tensor, backend: str) -> Tensor:
        return stream_linear(x, (weights[0], weights[1]), layout, backend=backend)

    def eager(x: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros(rows, out, device=x.device, dtype=x.dtype)
        y[und] = F.linear(x[und], weights[0])
        y[gen] = F.linear(x[gen], weights[1])
        return y

    def grouped() -> Function:
        raise_if_not_cuda(device)
        return lambda x, weights: torch.nn.functional.grouped_mm(x, weights.transpose(1, 2), offs=ends)

    flops, item = 2 * rows * columns * out, dtype.itemsize
    size = item * (rows * (columns + out) + 2 * columns * out)
    chosen = _candidates("stream_linear", device, dtype, eager, own, {"grouped product": grouped})
    return Case(
        "stream_linear",
        f"{rows} x {columns} to {out}",
        dtype,
        inputs,
        work={"forward": size, "backward": 2 * size},
        exact=partial(own, backend="reference"),
        flops={"forward": flops, "backward": 2 * flops},
        **chosen,
    )


def cases(device: torch.device, tiny: bool) -> Iterator[Case]:
    """BAGEL-7B's width, MLP and latents on a GPU; a small model's on a CPU."""
    if tiny:
        rows, hidden, width, sizes, dtype = 24, 16, 24, [(2, 3), (4, 4)], torch.float32
    elif device.type == "cuda":
        rows, hidden, width, sizes, dtype = 16384, 3584, 18944, [(64, 64)] * 7 + [(48, 32)] * 2, torch.bfloat16
    else:
        rows, hidden, width, sizes, dtype = 4096, 512, 1408, [(16, 16)] * 16, torch.float32
    yield norm_case(device, dtype, rows, hidden)
    yield swiglu_case(device, dtype, rows, width)
    yield noising_case(device, dtype, sizes)
    yield error_case(device, dtype, sum(h * w for h, w in sizes), PATCH * PATCH * CHANNELS)
    yield linear_case(device, dtype, rows, hidden, hidden)


def _names() -> list[tuple[str, str]]:
    return [(case.op, name) for case in cases(torch.device("cpu"), tiny=True) for name in case.candidates]


@pytest.mark.parametrize(("op", "candidate"), _names())
def test_forward_and_backward(benchmark, op, candidate):  # noqa: D103
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    (chosen,) = (case for case in cases(device, tiny=False) if case.op == op)
    benchmark.group = f"{op}, {chosen.shape}, {chosen.dtype}"
    try:
        function = chosen.candidates[candidate]()
    except CannotRun as error:
        pytest.skip(str(error))
    inputs = chosen.inputs(0)

    def call() -> None:
        outputs_and_gradients(function, inputs)
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark(call)


if __name__ == "__main__":
    raise SystemExit(main("stream_ops", __doc__.partition("\n")[0], cases))
