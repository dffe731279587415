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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from unigendet.config import check

if TYPE_CHECKING:  # the command line reads ``KINDS`` for its help: images and numbers are loaded when one is disturbed
    from PIL import Image

    from unigendet.evaluation.detection import DetectionSummary


def _jpeg(image: Image.Image, quality: float) -> Image.Image:
    from PIL import Image

    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=int(quality))
    decoded = Image.open(buffer)
    decoded.load()
    return decoded


def _resize(image: Image.Image, factor: float) -> Image.Image:
    from PIL import Image

    size = tuple(max(1, round(edge * factor)) for edge in image.size)
    return image.resize(size, Image.Resampling.BICUBIC)


def _blur(image: Image.Image, sigma: float) -> Image.Image:
    import numpy as np
    from PIL import Image
    from scipy.ndimage import gaussian_filter

    values = np.asarray(image, np.float32)  # [H, W, 3]
    blurred = gaussian_filter(values, (sigma, sigma, 0), mode="reflect", truncate=4.0)
    return Image.fromarray(np.clip(np.rint(blurred), 0, 255).astype(np.uint8))


@dataclass(frozen=True)
class Kind:
    """A kind of disturbance.

    ``levels``: the usual ones, from mild to strong; ``fits``: whether a finite number is a level, and ``need``: what it
    must be. ``apply``: an RGB image and a level → the disturbed image, RGB. The rest are words: ``title`` and ``axis``
    of a chart of it, ``meaning`` for whoever reads the chart; ``option``: what the levels on a command line are,
    ``metavar`` what stands for one, and ``parse`` what reads it.
    """

    levels: tuple[float, ...]
    fits: Callable[[float], bool]
    need: str
    apply: Callable[[Image.Image, float], Image.Image]
    title: str
    axis: str
    meaning: str
    option: str
    metavar: str
    parse: type[int] | type[float] = float


KINDS = {
    "jpeg": Kind(
        levels=(95, 85, 75, 50, 30),
        fits=lambda level: level == int(level) and 1 <= level <= 100,
        need="a whole number from 1 to 100",
        apply=_jpeg,
        title="JPEG compression",
        axis="JPEG quality",
        meaning="JPEG: compressed at this quality and decoded again.",
        option="JPEG qualities",
        metavar="Q",
        parse=int,
    ),
    "resize": Kind(
        levels=(0.75, 0.5, 0.25),
        fits=lambda level: 0 < level < 1,
        need="between 0 and 1",
        apply=_resize,
        title="Smaller images",
        axis="scale of both edges",
        meaning="Scale: both edges multiplied by this factor, the smaller image judged as it is.",
        option="factors, below 1, that both edges are scaled by",
        metavar="F",
    ),
    "blur": Kind(
        levels=(0.5, 1, 2, 4),
        fits=lambda level: level > 0,
        need="positive",
        apply=_blur,
        title="Blurred images",
        axis="Gaussian blur, σ in pixels",
        meaning="Blur: a Gaussian of this standard deviation in pixels of the original.",
        option="standard deviations of a Gaussian blur, in pixels",
        metavar="S",
    ),
}


@dataclass(frozen=True)
class Disturbance:
    """A callable from a PIL image to the disturbed one. ``kind`` and ``level`` as the module says.

    Raises ValueError for an unknown kind, or a level that is not one of its kind's.
    """

    kind: str
    level: float

    def __post_init__(self) -> None:
        check(self.kind in KINDS, "kind", self.kind, f"one of {', '.join(KINDS)}")
        kind, name = KINDS[self.kind], f"level of {self.kind}"
        check(math.isfinite(self.level), name, self.level, "a finite number")
        check(kind.fits(self.level), name, self.level, kind.need)

    @property
    def name(self) -> str:
        """``jpeg 75``, ``resize 0.5``."""
        return f"{self.kind} {self.level:.12g}"

    def __call__(self, image: Image.Image) -> Image.Image:
        """The disturbed image, RGB."""
        from unigendet.data.transforms import to_rgb

        return KINDS[self.kind].apply(to_rgb(image), self.level)


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
        mild, *_, strong = KINDS[kind].levels
        levels = sorted((d for d in disturbed if d.kind == kind), key=lambda d: d.level, reverse=mild > strong)
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
