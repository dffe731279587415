"""Pictures of a report: grids of sample images as PNG, training curves as inline SVG.

The same input gives the same bytes.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from unigendet.config import check
from unigendet.evaluation.generation import PIXEL_MAX

MAX_POINTS = 400  # of a curve; a screen shows no more, and the page stays small
# Colours that stand for the page's own, so that one SVG serves the light and the dark page.
INK, LINE, GREY, GOOD = "#010203", "#040506", "#070809", "#0a0b0c"
_PAGE = {INK: "currentColor", LINE: "var(--accent)", GREY: "var(--real)", GOOD: "var(--good)"}
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def tile(
    images: ArrayLike, *, columns: int, scale: int = 8, gap: int = 1, high: float = PIXEL_MAX
) -> NDArray[np.uint8]:
    """Images [N, H, W] or [N, H, W, 3], 0 (black) to ``high`` (white; values outside are clipped), row by row in one.

    Every pixel becomes scale × scale (nearest neighbour), images stand ``gap`` source pixels apart.
    Returns uint8 [rows·.., columns·.., 4], RGBA with transparent gaps.
    """
    array = np.asarray(images, dtype=np.float64)
    fits = array.ndim == 3 or (array.ndim == 4 and array.shape[3] == 3)
    check(fits and array.size > 0, "images.shape", array.shape, "[N, H, W] or [N, H, W, 3] with N at least 1")
    for name, value, least in (("columns", columns, 1), ("scale", scale, 1), ("gap", gap, 0)):
        check(value >= least, name, value, f"at least {least}")
    check(high > 0, "high", high, "positive")
    grey = _bytes(array, high)
    colour = grey if grey.ndim == 4 else np.repeat(grey[..., None], 3, axis=3)
    count, height, width = colour.shape[:3]
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    canvas = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, 4), np.uint8)
    for i in range(count):
        y, x = (i // columns) * (height + gap), (i % columns) * (width + gap)
        canvas[y : y + height, x : x + width, :3] = colour[i]
        canvas[y : y + height, x : x + width, 3] = 255
    return canvas.repeat(scale, axis=0).repeat(scale, axis=1)


def _bytes(images: NDArray[np.float64], high: float) -> NDArray[np.uint8]:
    """0..high as 0..255; values outside are clipped, NaN is black."""
    return np.round(np.clip(np.nan_to_num(images) / high, 0, 1) * 255).astype(np.uint8)


def save_image_grid(
    images: ArrayLike,
    path: str | Path,
    *,
    columns: int | None = None,
    scale: int = 8,
    gap: int = 1,
    high: float = PIXEL_MAX,
) -> Path:
    """Write images [N, H, W] or [N, H, W, 3] (see ``tile``) as one PNG; ``columns`` None: about as many as rows.

    Makes the folder if need be and returns the path. Raises ValueError for other shapes.
    """
    path = Path(path)
    columns = columns or math.ceil(math.sqrt(len(np.asarray(images))))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_png(tile(images, columns=columns, scale=scale, gap=gap, high=high)))
    return path


def data_uri(images: ArrayLike, *, columns: int, size: int, high: float = PIXEL_MAX) -> str:
    """Images (see ``tile``) as one ``data:`` address for an HTML page, each about ``size`` pixels high.

    Small ones are enlarged by a whole factor (nearest neighbour), large ones reduced (Lanczos), so a page stays small.
    """
    array = np.asarray(images, dtype=np.float64)
    height, width = array.shape[1:3]
    if height > size:
        array, high = _reduced(array, size, max(1, round(width * size / height)), high), 255.0
    pixels = tile(array, columns=columns, scale=max(1, size // height), gap=max(1, array.shape[1] // 8), high=high)
    return "data:image/png;base64," + base64.b64encode(_png(pixels)).decode("ascii")


def _reduced(images: NDArray[np.float64], height: int, width: int, high: float) -> NDArray[np.float64]:
    """Images [N, H, W] or [N, H, W, 3] at another size, values 0..255."""
    pictures = [Image.fromarray(image) for image in _bytes(images, high)]
    small = [picture.resize((width, height), Image.Resampling.LANCZOS) for picture in pictures]
    return np.stack([np.asarray(image, dtype=np.float64) for image in small])


def _png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def line_chart(steps: Sequence[float], values: Sequence[float], *, name: str, salt: str) -> str:
    """One training curve as an ``<svg>`` element: every point faintly, a moving mean on top.

    Positive values that span more than a factor of 20 get a logarithmic axis. More than ``MAX_POINTS`` points are
    averaged. Colours are the page's ``currentColor`` and ``var(--accent)``.
    ``name`` is its label for screen readers; ``salt`` must differ between the charts of a page (it makes ids unique).
    """
    step, value = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    check(step.shape == value.shape and step.ndim == 1, f"values.shape of {name}", value.shape, f"{step.shape}, 1-D")
    keep = np.isfinite(step) & np.isfinite(value)
    step, value = _thin(step[keep]), _thin(value[keep])
    window = max(1, len(value) // 20) | 1

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        if window > 1:
            axes.plot(step, value, color=LINE, linewidth=0.8, alpha=0.35)
        axes.plot(step, _moving_mean(value, window), color=LINE, linewidth=1.8)
        if len(value) == 1:
            axes.plot(step, value, "o", color=LINE)
        _dress(axes, value)

    return svg_chart(draw, name=name, salt=salt)


def svg_chart(draw: Callable[[Figure], None], *, name: str, salt: str, size: tuple[float, float] = (3.3, 2.1)) -> str:
    """What ``draw`` puts on a figure of ``size`` inches, as an ``<svg>`` element in the page's colours.

    Draw with ``INK`` (text and axes), ``LINE`` (the accent), ``GREY`` and ``GOOD``. ``name`` and ``salt`` as in
    ``line_chart``.
    """
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": salt}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    return _inline(buffer.getvalue(), name)


def _dress(axes: matplotlib.axes.Axes, value: NDArray[np.float64]) -> None:
    """A training curve's axes."""
    if len(value) and value.min() > 0 and value.max() / value.min() > 20:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("step")
    clean(axes)


def clean(axes: matplotlib.axes.Axes) -> None:
    """Little ink: two spines, no ticks, a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_alpha(0.4)
    axes.tick_params(length=0)
    axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)


def _thin(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """At most MAX_POINTS values: the means of equal runs of neighbours."""
    if len(values) <= MAX_POINTS:
        return values
    return np.array([part.mean() for part in np.array_split(values, MAX_POINTS)])


def _moving_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Centred mean over an odd ``window``, over the part of it that exists at the ends."""
    if window == 1:
        return values
    ones = np.ones(window)
    return np.convolve(values, ones, "same") / np.convolve(np.ones_like(values), ones, "same")


def _inline(svg: str, name: str) -> str:
    """matplotlib's SVG file as an element of a page: no prolog, no ids but those it refers to, the page's colours."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<title>.*?</title>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font: [0-9.]+px [^;\"]*", lambda m: m[0].split("px")[0] + "px system-ui, sans-serif", svg)
    for colour, name_on_page in _PAGE.items():
        svg = svg.replace(colour, name_on_page)
    label = "".join(c if c.isalnum() or c in " -_.,:()" else " " for c in name)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
