"""The standard traces as real packs, and the models that run on them.

Contents are random, since no work depends on them: text ids of the whole vocabulary, standard normal pixels and
latents. A text that ends its sample carries the loss; after images it is an answer, and labelled real or fake.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from unigendet.config import LatentConfig, ModelConfig, SpecialTokens, VisionConfig, bagel_7b, quickstart
from unigendet.packing import LatentImage, PackedBatch, Sample, Segment, Text, VitImage, pack

from . import traces


def pack_of(trace: traces.Trace, config: ModelConfig, seed: int = 0) -> PackedBatch:
    """The trace as a pack for a model of that config, on the CPU; contents are float32 and follow from ``seed``.

    The pack's layout is ``trace.layout``. Raises ValueError where an image is larger than the config's position tables,
    or a text longer than its RoPE positions.
    """
    return pack(samples_of(trace, config, seed), config)


def samples_of(trace: traces.Trace, config: ModelConfig, seed: int = 0) -> list[Sample]:
    """The trace's samples with random contents, before they are packed."""
    contents = _Contents(config, np.random.default_rng(seed), torch.Generator().manual_seed(seed))
    return [contents.sample(sample, f"{trace.name} {i}") for i, sample in enumerate(trace.samples)]


def small_config(
    hidden: int = 512,
    layers: int = 4,
    *,
    heads: int = 8,
    kv_heads: int = 2,
    intermediate: int = 1408,
    vocab: int = 4096,
) -> ModelConfig:
    """A model for CPUs that takes images as BAGEL does: ViT patches of 14 pixels, 70 a side, latents of 16 channels."""
    return ModelConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        vocab_size=vocab,
        vision=VisionConfig(hidden_size=256, intermediate_size=704, num_layers=4, num_heads=4),
        latent=LatentConfig(channels=16, patch_size=2, max_size=64),
        special_tokens=SpecialTokens(bos=0, eos=1, start_of_image=2, end_of_image=3),
    )


def quickstart_config() -> ModelConfig:
    """The quickstart's model, about a million parameters."""
    return quickstart()


def bagel_width(layers: int) -> ModelConfig:
    """BAGEL-7B-MoT with that many decoder layers; all else, the ViT included, in its published size."""
    return dataclasses.replace(bagel_7b(), num_layers=layers)


@dataclasses.dataclass(frozen=True)
class _Contents:
    """Random contents for the segments of a trace, from two generators."""

    config: ModelConfig
    integers: np.random.Generator
    normals: torch.Generator

    def sample(self, segments: traces.Sample, name: str) -> Sample:
        parts = [self._segment(segment) for segment in segments]
        if not isinstance(parts[-1], Text):
            return Sample(tuple(parts), name=name)
        parts[-1] = dataclasses.replace(parts[-1], loss=True)
        has_images = any(segment.grid for segment in segments)
        return Sample(tuple(parts), int(self.integers.integers(2)) if has_images else None, name)

    def _segment(self, segment: traces.Segment) -> Segment:
        if segment.grid is None:
            return Text(self.integers.integers(0, self.config.vocab_size, segment.tokens - 2).tolist())
        if segment.latent:
            latent = self.config.latent
            image = self._image(latent.channels, latent.patch_size, segment.grid)
            return LatentImage(image, noised=segment.mode == "noise")
        vision = self.config.vision
        return VitImage(self._image(vision.num_channels, vision.patch_size, segment.grid))

    def _image(self, channels: int, patch: int, grid: tuple[int, int]) -> Tensor:
        return torch.randn(channels, *(patch * side for side in grid), generator=self.normals)
