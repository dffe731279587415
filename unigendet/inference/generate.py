"""Generation: denoising latent images by guided flow matching, many requests at a time.

The noised image is a block of queries over the prefix's cached keys and values and itself. Guidance needs up to three
velocities per request: with all conditions, without the texts, and without the images. They are branches: samples of
one pack, each with a prefix of its own, so that a step costs one pass through the model, not three. Writing v, v_text,
v_image for the three,

    w = v_text + text_scale · (v − v_text)          v' = v_image + image_scale · (w − v_image)

(v_image = v without an image among the conditions), then the renorm, then z ← z − v' · (t_i − t_{i+1}). The block's
keys and values are never kept in the cache. Source: paper section 3.3, BAGEL's sampler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unigendet.config import GuidanceConfig, check
from unigendet.model.cache import KVCache
from unigendet.model.losses import clean_latents, shift_timesteps
from unigendet.model.unigendet import UniGenDet, latent_rows
from unigendet.packing import LatentImage, PackedBatch, Sample, Segment, Text, pack, sample_length, unpatchify


@dataclass(frozen=True)
class GenerationRequest:
    """What one image is made from: ``conditions`` in order (texts, clean images), and its ``size`` (height, width).

    The size is in pixels. Raises ValueError for a noised image among the conditions.
    """

    conditions: tuple[Segment, ...]
    size: tuple[int, int]
    name: str = ""

    def __post_init__(self) -> None:
        for i, segment in enumerate(self.conditions):
            noised = isinstance(segment, LatentImage) and segment.noised
            check(not noised, f"conditions[{i}]", "a noised latent image", "a text or a clean image")

    def branch(self, *, texts: bool = True, images: bool = True) -> tuple[Segment, ...]:
        """The conditions without their texts or without their images."""
        return tuple(s for s in self.conditions if (texts if isinstance(s, Text) else images))


@torch.no_grad()  # not inference_mode: tables that the model caches in here must stay usable for training
def generate_latents(
    model: UniGenDet,
    requests: Sequence[GenerationRequest],
    guidance: GuidanceConfig | None = None,
    *,
    noise: Sequence[Tensor] | None = None,
    generator: torch.Generator | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Tensor]:
    """Denoise one latent image per request.

    Args:
        model: on any device; runs in its parameters' dtype.
        requests: at least one; their sizes are multiples of the model's latent stride.
        guidance: scales, steps and renorm.
        noise: per request the initial tokens [h·w, patch²·channels]; default: drawn from ``generator``, in float32 on
            its device (a result does not depend on the other requests only with given noise).
        generator: for the noise; default: the model's device's own.
        progress: called with (steps done, steps) after every step.

    Returns:
        Per request the final tokens [h·w, patch²·channels], float32, on the model's device; see ``tokens_to_latent``.

    Raises:
        ValueError: no requests, a size the model cannot make, or noise of another shape.
    """
    guidance = guidance or GuidanceConfig()
    if len(requests) == 0:
        raise ValueError("requests is empty; there must be at least one")
    grids = [latent_grid(model, request.size, f"requests[{i}].size") for i, request in enumerate(requests)]
    tokens = torch.cat(_initial(model, grids, noise, generator)).to(model.device)
    branches = _Branches(model, requests, grids, guidance)
    times = shift_timesteps(torch.linspace(1, 0, guidance.num_timesteps), guidance.timestep_shift)
    # Compared in float32, as the times are: 0.4 itself does not lie in an interval that begins above 0.4.
    guided = ((times > guidance.interval[0]) & (times <= guidance.interval[1])).tolist()
    times = times.tolist()
    bounds = [rows * columns for rows, columns in grids]
    steps = len(times) - 1
    for i in range(steps):
        velocity = branches.velocity(tokens, times[i], guided[i])
        tokens = tokens - velocity * (times[i] - times[i + 1])
        if progress is not None:
            progress(i + 1, steps)
    return list(tokens.split(bounds))


def tokens_to_latent(model: UniGenDet, tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Tokens [h·w, patch²·channels] of an image of ``size`` pixels → latent [channels, patch·h, patch·w]."""
    stride = model.config.latent.stride
    return unpatchify(tokens, size[0] // stride, size[1] // stride, model.config.latent.patch_size)


def latent_grid(model: UniGenDet, size: tuple[int, int], name: str = "size") -> tuple[int, int]:
    """Rows and columns of latent tokens of an image of ``size`` pixels. ValueError if the model cannot make it."""
    latent = model.config.latent
    most = latent.stride * latent.max_size
    fits = len(size) == 2 and all(side > 0 and side % latent.stride == 0 and side <= most for side in size)
    check(fits, name, size, f"(height, width), multiples of {latent.stride} pixels and at most {most}")
    return size[0] // latent.stride, size[1] // latent.stride


def _initial(
    model: UniGenDet, grids: list[tuple[int, int]], noise: Sequence[Tensor] | None, generator: torch.Generator | None
) -> list[Tensor]:
    shapes = [(rows * columns, model.config.latent.token_dim) for rows, columns in grids]
    if noise is None:
        device = generator.device if generator is not None else model.device
        return [torch.randn(shape, generator=generator, device=device) for shape in shapes]
    if [tuple(n.shape) for n in noise] != shapes:
        raise ValueError(f"noise has shapes {[list(n.shape) for n in noise]}; they must be {[list(s) for s in shapes]}")
    return [n.float() for n in noise]


class _Branches:
    """The requests' branches with their cache: all conditions; without texts; without images, where that differs."""

    def __init__(
        self,
        model: UniGenDet,
        requests: Sequence[GenerationRequest],
        grids: list[tuple[int, int]],
        guidance: GuidanceConfig,
    ) -> None:
        self.model, self.guidance, self.count = model, guidance, len(requests)
        self.sizes = [rows * columns for rows, columns in grids]
        conditions = [r.conditions for r in requests]
        self.with_image: list[int] = []
        if guidance.text_scale > 1:
            conditions += [r.branch(texts=False) for r in requests]
            if guidance.image_scale > 1:
                self.with_image = [i for i, r in enumerate(requests) if r.branch(images=False) != r.conditions]
                conditions += [requests[i].branch(images=False) for i in self.with_image]
        owners = [*range(self.count), *range(self.count), *self.with_image]
        self.owners = owners[: len(conditions)]
        blocks = [_block(model, *grids[i]) for i in self.owners]
        self.samples = [
            Sample((*prefix, block), name=requests[i].name)
            for prefix, block, i in zip(conditions, blocks, self.owners, strict=True)
        ]
        capacity = [sample_length(sample, model.config) for sample in self.samples]
        self.prefix = [n - self.sizes[i] - 2 for n, i in zip(capacity, self.owners, strict=True)]
        self.cache = model.new_cache(capacity)
        self.filled = False
        self.packs: dict[int, PackedBatch] = {}

    def velocity(self, tokens: Tensor, t: float, guided: bool) -> Tensor:
        """The velocity [tokens, patch²·channels] at time t, float32; guided if there is any guidance."""
        guided = guided and len(self.samples) > self.count
        # The first pass fills the cache of every branch, whether or not its step is guided.
        parts = self._pass(tokens, t, len(self.samples) if guided or not self.filled else self.count)
        if not guided:
            return torch.cat(parts[: self.count])
        images = dict(zip(self.with_image, parts[2 * self.count :], strict=True))
        return torch.cat(
            [guide(parts[i], parts[self.count + i], images.get(i, parts[i]), self.guidance) for i in range(self.count)]
        )

    def _pass(self, tokens: Tensor, t: float, count: int) -> list[Tensor]:
        """One pass over the first ``count`` branches: their velocities."""
        owners, cache = self.owners[:count], self.cache.first(count)
        batch = self._batch(count, cache)
        device = self.model.device
        blocks = [tokens.split(self.sizes)[i] for i in owners]
        times = torch.where(batch.noised_images, t, 0.0).to(device)
        latents = torch.cat(blocks)
        if not self.filled:  # the clean latents of the conditions lie among the blocks
            latents = clean_latents(self.model, batch).tokens.float().index_copy(0, batch.noised_tokens, latents)
        output = self.model(batch, latent_tokens=latents, timesteps=times, cache=cache)
        rows = latent_rows(batch).index_select(0, batch.noised_tokens)
        velocity = self.model.velocity(output.hidden, rows).float()
        if not self.filled:
            self.cache.commit(self.prefix)
            self.filled = True
        return list(velocity.split([self.sizes[i] for i in owners]))

    def _batch(self, count: int, cache: KVCache) -> PackedBatch:
        """The pack of the first ``count`` branches; after the first pass it is the same at every step."""
        if not self.filled:
            return pack(self.samples, self.model.config, capacity=cache.capacity).to(self.model.device)
        if count not in self.packs:
            batch = pack(self.samples[:count], self.model.config, cached=cache.lengths, capacity=cache.capacity)
            self.packs[count] = batch.to(self.model.device)
        return self.packs[count]


def _block(model: UniGenDet, rows: int, columns: int) -> LatentImage:
    latent = model.config.latent
    return LatentImage(torch.zeros(latent.channels, rows * latent.patch_size, columns * latent.patch_size), noised=True)


def guide(v: Tensor, v_text: Tensor, v_image: Tensor, guidance: GuidanceConfig) -> Tensor:
    """The guided velocity of one image [tokens, features] from its three branches, by the module's formula."""
    guided = v_text + guidance.text_scale * (v - v_text)
    if guidance.renorm == "text_channel":
        guided = guided * _renorm(v, guided, guidance, per_token=True)
    if guidance.image_scale > 1:
        guided = v_image + guidance.image_scale * (guided - v_image)
    if guidance.renorm == "text_channel":
        return guided
    return guided * _renorm(v, guided, guidance, per_token=guidance.renorm == "channel")


def _renorm(v: Tensor, guided: Tensor, guidance: GuidanceConfig, per_token: bool) -> Tensor:
    norms = [x.norm(dim=-1, keepdim=True) if per_token else x.norm() for x in (v, guided)]
    return (norms[0] / (norms[1] + 1e-8)).clamp(min=guidance.renorm_min, max=1.0)
