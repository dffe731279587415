"""From image files to normalised tensors.

Both of a sample's views, the latent one and the ViT one, are resized from the original image: resizing one from the
other would lose the very traces a detector looks for.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from unigendet.config import ImageConfig


def read_image(path: str | Path) -> Image.Image:
    """Decode an image file completely.

    Raises:
        FileNotFoundError: there is no such file; the message names it.
        ValueError: the file is no image, or it is damaged or cut short; the message names it.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError as error:
        raise FileNotFoundError(f"image {path} does not exist") from error
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"image {path} cannot be decoded: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB version of ``image``; transparency is composited on white. Sixteen-bit grey is scaled to eight bits."""
    if image.mode.startswith("I;16") or image.mode == "I":
        image = Image.fromarray((np.clip(np.asarray(image, np.int64), 0, 65535) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def resized_size(
    width: int, height: int, *, min_size: int, max_size: int, stride: int, max_pixels: int = 14 * 14 * 9 * 1024
) -> tuple[int, int]:
    """The (width, height) an image is resized to.

    The image is enlarged until its shorter edge has ``min_size`` and shrunk until its longer edge has ``max_size``
    (which wins where both cannot hold), each edge is rounded to the nearest multiple of ``stride`` (at least one),
    and then the whole is shrunk to at most ``max_pixels``.

    With every published setting this is BAGEL's arithmetic, its intermediate rounding to whole pixels included. Over
    the pixel budget, which those settings cannot reach, both edges shrink by the square root of the excess and are
    rounded down; BAGEL shrinks each edge by the whole excess.
    """
    if min(width, height) < 1:
        raise ValueError(f"the image is {width}×{height}; both edges must be at least 1 pixel")
    scale = min(max_size / max(width, height), 1.0)
    scale = max(scale, min_size / min(width, height))
    size = _scaled(width, height, scale, stride)
    if max(size) > max_size:
        size = _scaled(*size, max_size / max(size), stride)
    if size[0] * size[1] > max_pixels:
        scale = math.sqrt(max_pixels / (size[0] * size[1]))
        size = tuple(max(stride, int(edge * scale) // stride * stride) for edge in size)
        if size[0] * size[1] > max_pixels:  # a very long image: one edge is already at its least
            longest = max(stride, max_pixels // min(size) // stride * stride)
            size = tuple(min(edge, longest) for edge in size)
    return size[0], size[1]


def _scaled(width: int, height: int, scale: float, stride: int) -> tuple[int, int]:
    return tuple(max(stride, round(round(edge * scale) / stride) * stride) for edge in (width, height))


class ImageTransform:
    """Resizes and normalises one view of an image.

    Args:
        min_size, max_size, stride, max_pixels: see ``resized_size``.
        channels: 3 (RGB) or 1 (grey).
    """

    def __init__(
        self, min_size: int, max_size: int, stride: int, max_pixels: int = 14 * 14 * 9 * 1024, channels: int = 3
    ) -> None:
        self.config = ImageConfig(min_size=min_size, max_size=max_size, stride=stride, max_pixels=max_pixels)
        if channels not in (1, 3):
            raise ValueError(f"channels is {channels}; it must be 1 (grey) or 3 (RGB)")
        self.channels = channels

    @classmethod
    def from_config(cls, config: ImageConfig, channels: int = 3) -> ImageTransform:
        """The transform with the sizes of ``config``."""
        return cls(config.min_size, config.max_size, config.stride, config.max_pixels, channels)

    def __call__(self, image: Image.Image) -> Tensor:
        """The original image → float32 [channels, H, W] in [-1, 1]. An image that already has its size is not
        resampled.
        """
        config = self.config
        image = to_rgb(image)
        if self.channels == 1:
            image = image.convert("L")
        size = resized_size(
            *image.size,
            min_size=config.min_size,
            max_size=config.max_size,
            stride=config.stride,
            max_pixels=config.max_pixels,
        )
        if size != image.size:
            image = image.resize(size, Image.Resampling.BICUBIC)  # PIL's resampling is antialiased
        values = torch.from_numpy(np.asarray(image, np.float32) / 255)
        values = values[None] if self.channels == 1 else values.permute(2, 0, 1)
        return ((values - 0.5) / 0.5).contiguous()


def to_image(pixels: Tensor) -> Image.Image:
    """Normalised pixels [1 or 3, H, W] in [-1, 1] (clipped) → an 8-bit grey or RGB image."""
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3):
        raise ValueError(f"pixels has shape {list(pixels.shape)}; it must be [1, H, W] or [3, H, W]")
    values = ((pixels.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(values[0].numpy() if len(values) == 1 else values.permute(1, 2, 0).contiguous().numpy())
