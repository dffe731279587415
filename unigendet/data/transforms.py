"""From image files to normalised tensors.

Both of a sample's views, the latent one and the ViT one, are resized from the original image: resizing one from the
other would lose the very traces a detector looks for.
"""

from __future__ import annotations

import dataclasses
import math
import os
import stat
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from unigendet.config import ImageConfig


class BrokenImageError(ValueError):
    """An image file that is there and cannot be read as one; its text names the file and says what to do."""


def read_image(path: str | Path) -> Image.Image:
    """The first picture of an image file, decoded completely, as ``to_rgb`` makes it: RGB, 8 bits, upright.

    Raises:
        FileNotFoundError: there is no such file; the message names it.
        BrokenImageError: it may not be read; it is no image, damaged, cut short or empty; it has more than twice
            ``PIL.Image.MAX_IMAGE_PIXELS`` pixels (178,956,970, unless an application sets another limit); or ``to_rgb``
            refuses it. The message names the file and what to do.
    """
    try:
        check_file(path)
        with Image.open(path) as image:
            return to_rgb(image)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"image {path} does not exist; check the name, or whether it was moved") from error
    except Exception as error:  # on damaged files Pillow's decoders raise whatever goes wrong inside them
        raise BrokenImageError(f"image {path} {_reason(error)}") from error


class _Refused(ValueError):
    """Its argument says what is wrong and what to do, as the rest of a sentence on the image."""

    def __str__(self) -> str:
        return f"the image {self.args[0]}"


def check_file(path: str | Path) -> None:
    """Raise ValueError, to be completed by the file's name, unless ``path`` is a regular file that is not empty;
    OSError if it cannot be looked at. Nothing is opened: opening a pipe may wait without end.
    """
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise _Refused("is a folder; name the images in it, or a folder that may be listed")
    if not stat.S_ISREG(status.st_mode):  # a pipe or a device might be waited for without end
        raise _Refused("is a pipe or a device; save it to a file first")
    if status.st_size == 0:
        raise _Refused("is empty (0 bytes); copy or download it again")


def _reason(error: Exception) -> str:
    """Why an image cannot be had, and what to do."""
    if isinstance(error, _Refused):
        return error.args[0]
    if isinstance(error, UnidentifiedImageError):
        return "cannot be decoded: it has no format that Pillow knows, or a damaged header; convert it to PNG or JPEG"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"has too many pixels to be opened safely: {error}; scale it down first"
    if isinstance(error, PermissionError):
        return "may not be read: permission denied; change its permissions"
    if isinstance(error, MemoryError):
        return "cannot be decoded: there is not enough memory; scale it down first"
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be read: {error.strerror}; check the file and where it is kept"
    what = str(error) or type(error).__name__
    return f"cannot be decoded: {what}; the file is damaged or cut short: copy or save it anew"


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright RGB version of ``image``, 8 bits per channel.

    - An orientation in its EXIF data is applied: the detector sees a photograph as people do.
    - Transparency is composited on white.
    - 16-bit grey is scaled from 65535; 32-bit grey from the least of 255 and 65535 (integers) or 1, 255 and 65535
      (floating point) that none of its values exceeds. Pillow itself cuts 16-bit colour down to its upper bytes.
    - CMYK and other colour models are converted by formula; colour profiles are not applied.

    Raises:
        ValueError: 32-bit grey with values below 0, above 65535, or not finite.
    """
    image.load()
    image = _upright(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):
        return _eight_bits(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data, in ways without number, of a picture that is whole
        return image


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits → ``L``; its transparent value, if it has one, becomes white."""
    values = np.asarray(image).astype(np.float32)
    low, high = values.min(), values.max()
    scales = {"I": (255, 65535), "F": (1, 255, 65535)}.get(image.mode, (65535,))
    if not (low >= 0 and high <= scales[-1]):  # so phrased, NaN fails too
        wanted = ", ".join(str(scale) for scale in scales[:-1])
        raise _Refused(
            f"holds 32-bit values from {low:g} to {high:g}; they must be from 0 to {wanted} or {scales[-1]}: save it "
            "with 8 or 16 bits"
        )
    grey = np.rint(values * (255 / next(scale for scale in scales if high <= scale)))
    if image.info.get("transparency") is not None:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey.astype(np.uint8))


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

    def size_of(self, width: int, height: int) -> tuple[int, int]:
        """The (width, height) of the view of an image of this size, see ``resized_size``."""
        return resized_size(width, height, **dataclasses.asdict(self.config))

    def __call__(self, image: Image.Image) -> Tensor:
        """The original image, of any mode → float32 [channels, H, W] in [-1, 1]. An image that already has its size is
        not resampled.
        """
        image = to_rgb(image)
        if self.channels == 1:
            image = image.convert("L")
        size = self.size_of(*image.size)
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
