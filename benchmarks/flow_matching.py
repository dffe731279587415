"""``flow_matching`` (noise, target and patches in one pass) and ``flow_matching_loss`` (squared error per token).

Peers: plain PyTorch image by image, as the published code goes, eager and compiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from unigendet.ops import LatentGrids, flow_matching, flow_matching_loss

from .contest import Case, Work
from .judge import whole
from .stream_case import candidates, random

PATCH, CHANNELS = 2, 16  # BAGEL's latents
FEATURES = PATCH * PATCH * CHANNELS
BACKENDS = ("torch", "triton")


def noising_case(device: torch.device, dtype: torch.dtype, sizes: list[tuple[int, int]]) -> Case:
    """Latents of images of ``sizes`` tokens. They need no gradient in training: forward only."""
    grids = LatentGrids.from_sizes(sizes)

    def inputs(seed: int) -> tuple[Tensor, ...]:
        make = random(device, dtype, seed)
        return make(grids.rows * FEATURES), make(grids.rows, FEATURES), make(len(sizes)).float().sigmoid()

    def own(latents: Tensor, noise: Tensor, timesteps: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        sizes = {"patch_size": PATCH, "channels": CHANNELS}
        return flow_matching(latents, noise, timesteps, grids, **sizes, backend=backend)

    def eager(latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        tokens, start = [], 0
        for h, w in sizes:
            image = latents[start : start + h * w * FEATURES].view(CHANNELS, h, PATCH, w, PATCH)
            tokens.append(torch.einsum("chpwq->hwpqc", image).reshape(h * w, FEATURES))
            start += h * w * FEATURES
        clean = torch.cat(tokens)
        counts = torch.tensor([h * w for h, w in sizes], device=device)
        t = timesteps.repeat_interleave(counts, output_size=len(clean))[:, None].to(clean.dtype)
        return (1 - t) * clean + t * noise, noise - clean

    return Case(
        "flow_matching",
        f"{len(sizes)} images, {grids.rows} x {FEATURES}",
        dtype,
        inputs,
        work={"forward": Work(bytes=4 * dtype.itemsize * grids.rows * FEATURES)},
        truth=whole(partial(own, backend="reference")),
        **candidates("flow_matching", device, dtype, eager, own, backends=BACKENDS),
    )


def error_case(device: torch.device, dtype: torch.dtype, rows: int, columns: int) -> Case:
    """The prediction wants a gradient, the target none."""

    def inputs(seed: int) -> tuple[Tensor, Tensor]:
        make = random(device, dtype, seed)
        return make(rows, columns).requires_grad_(), make(rows, columns)

    def eager(prediction: Tensor, target: Tensor) -> Tensor:
        wide = torch.float64 if target.dtype == torch.float64 else torch.float32
        return (prediction.to(wide) - target.to(wide)).square().mean(-1)

    size = dtype.itemsize * rows * columns
    return Case(
        "flow_matching_loss",
        f"{rows} x {columns}",
        dtype,
        inputs,
        work={"forward": Work(bytes=2 * size + 4 * rows), "backward": Work(bytes=3 * size + 4 * rows)},
        truth=whole(partial(flow_matching_loss, backend="reference")),
        **candidates("flow_matching_loss", device, dtype, eager, flow_matching_loss, backends=BACKENDS),
    )


def cases(device: torch.device, size: str) -> Iterator[Case]:
    """A pack of large images in bfloat16 on GPUs, one of small ones in float32 on CPUs."""
    if size == "tiny":
        sizes, dtype = [(2, 3), (4, 4)], torch.float32
    elif device.type == "cuda":
        sizes, dtype = [(64, 64)] * 62 + [(48, 32)] * 4, torch.bfloat16  # large enough for a GPU to show its bandwidth
    else:
        sizes, dtype = [(16, 16)] * 16, torch.float32
    yield noising_case(device, dtype, sizes)
    yield error_case(device, dtype, sum(h * w for h, w in sizes), FEATURES)
