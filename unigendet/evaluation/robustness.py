"""What images go through on their way over the web, as disturbances of a set strength, and accuracy under them.

A disturbance is applied to the original image, before the model's views are made of it, and draws no random numbers.
The image is first made RGB as for the undisturbed views.

- ``jpeg``: compressed at this quality (1 to 100, by Pillow, with its usual chroma subsampling) and decoded again.
- ``resize``: both edges scaled by this factor, below 1, rounded and at least one pixel, with antialiased bicubic
  resampling. The smaller image *is* the disturbed one, as a site would serve it; it is not enlarged again. The views
  then do with it what they do with any image of that size, so a factor matters less for an image that they would shrink
  anyway.
- ``blur``: a Gaussian of this standard deviation in pixels of the original, cut at four standard deviations, with the
  image mirrored at its edges; rounded to 8 bits.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from unigendet.config import check
from unigendet.data.transforms import to_rgb
from unigendet.evaluation.detection import DetectionSummary

LEVELS = {"jpeg": (95, 85, 75, 50, 30), "resize": (0.75, 0.5, 0.25), "blur": (0.5, 1, 2, 4)}  # the usual ones


@dataclass(frozen=True)
class Disturbance:
    """A callable from a PIL image to the disturbed one. ``kind`` and ``level`` as the module says.

    Raises ValueError for an unknown kind, or a level that is not one of its kind's.
    """

    kind: str
    level: float

    def __post_init__(self) -> None:
        check(self.kind in LEVELS, "kind", self.kind, f"one of {', '.join(LEVELS)}")
        fits, need = {
            "jpeg": (self.level == int(self.level) and 1 <= self.level <= 100, "a whole number from 1 to 100"),
            "resize": (0 < self.level < 1, "between 0 and 1"),
            "blur": (0 < self.level < math.inf, "positive and finite"),
        }[self.kind] if math.isfinite(self.level) else (False, "a finite number")  # fmt: skip
        check(fits, f"level of {self.kind}", self.level, need)

    @property
    def name(self) -> str:
        """``jpeg 75``, ``resize 0.5``."""
        return f"{self.kind} {self.level:g}"

    def __call__(self, image: Image.Image) -> Image.Image:
        """The disturbed image, RGB."""
        return {"jpeg": _jpeg, "resize": _resize, "blur": _blur}[self.kind](to_rgb(image), self.level)


def _jpeg(image: Image.Image, quality: float) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=int(quality))
    decoded = Image.open(buffer)
    decoded.load()
    return decoded


def _resize(image: Image.Image, factor: float) -> Image.Image:
    size = tuple(max(1, round(edge * factor)) for edge in image.size)
    return image.resize(size, Image.Resampling.BICUBIC)


def _blur(image: Image.Image, sigma: float) -> Image.Image:
    values = np.asarray(image, np.float32)  # [H, W, 3]
    blurred = gaussian_filter(values, (sigma, sigma, 0), mode="reflect", truncate=4.0)
    return Image.fromarray(np.clip(np.rint(blurred), 0, 255).astype(np.uint8))


@dataclass(frozen=True)
class CurvePoint:
    """The verdicts at one level; ``level`` None is the undisturbed images. ``groups``: group → accuracy."""

    level: float | None
    count: int
    unparsed: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    balanced_accuracy: float | None
    roc_auc: float | None
    groups: dict[str, float]


def robustness_curves(
    undisturbed: DetectionSummary, disturbed: Mapping[Disturbance, DetectionSummary]
) -> dict[str, tuple[CurvePoint, ...]]:
    """Kind → its points, the undisturbed one first and then from mild to strong."""
    curves = {}
    for kind in dict.fromkeys(disturbance.kind for disturbance in disturbed):
        levels = sorted((d for d in disturbed if d.kind == kind), key=lambda d: d.level, reverse=kind != "blur")
        points = [(None, undisturbed), *((d.level, disturbed[d]) for d in levels)]
        curves[kind] = tuple(_point(level, summary) for level, summary in points)
    return curves


def _point(level: float | None, summary: DetectionSummary) -> CurvePoint:
    m = summary.overall
    return CurvePoint(
        level,
        m.count,
        m.unparsed,
        m.accuracy,
        m.accuracy_interval,
        m.balanced_accuracy,
        m.roc_auc,
        {group.group: group.accuracy for group in summary.groups},
    )
