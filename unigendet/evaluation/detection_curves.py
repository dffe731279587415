"""The curves of a detector, as numbers and as charts for a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.axes
import numpy as np
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve, roc_curve

from unigendet.evaluation.detection import FAKE, DetectionOutcome, fake_ranking
from unigendet.evaluation.figures import GOOD, GREY, INK, LINE, MAX_POINTS, clean, svg_chart
from unigendet.evaluation.reliability import ReliabilityBin
from unigendet.evaluation.robustness import KINDS, CurvePoint


@dataclass(frozen=True)
class Curve:
    """A curve's points, at most ``MAX_POINTS`` of them; both coordinates are shares in [0, 1]."""

    x: tuple[float, ...]
    y: tuple[float, ...]


def detector_curves(outcomes: Sequence[DetectionOutcome]) -> dict[str, Curve | None]:
    """``roc``: the share of the real images called fake (x) and of the fakes called fake (y), as the line moves.
    ``precision_recall``: the share of the fakes that are found (x) and of the finds that are fake (y).
    Both None where a class or all probabilities are missing.
    """
    rank = fake_ranking(outcomes)
    is_fake = np.array([o.label == FAKE for o in outcomes])
    if rank is None or is_fake.all() or not is_fake.any():
        return {"roc": None, "precision_recall": None}
    false_alarms, found, _ = roc_curve(is_fake, rank)
    precision, recall, _ = precision_recall_curve(is_fake, rank, drop_intermediate=True)
    return {"roc": _curve(false_alarms, found), "precision_recall": _curve(recall[::-1], precision[::-1])}


def _curve(x: NDArray[np.float64], y: NDArray[np.float64]) -> Curve:
    """Evenly chosen points, both ends among them."""
    places = np.unique(np.linspace(0, len(x) - 1, min(len(x), MAX_POINTS)).round().astype(int))
    return Curve(tuple(x[places].tolist()), tuple(y[places].tolist()))


def roc_chart(curve: Curve, *, name: str) -> str:
    """The ROC curve as an ``<svg>`` element, with the diagonal of guessing; ``name`` for screen readers."""

    def draw(figure: Figure) -> None:
        axes = _shares(figure, "real images called fake", "fakes called fake")
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=(0, (4, 3)))
        axes.plot(curve.x, curve.y, color=LINE, linewidth=1.8)

    return svg_chart(draw, name=name, salt="roc", size=(3.3, 2.8))


def precision_recall_chart(curve: Curve, fakes: float, *, name: str) -> str:
    """The precision-recall curve as an ``<svg>`` element; ``fakes``: their share of the images, which is the precision
    of guessing.
    """

    def draw(figure: Figure) -> None:
        axes = _shares(figure, "fakes that are found (recall)", "finds that are fake (precision)")
        axes.plot([0, 1], [fakes, fakes], color=GREY, linewidth=1, linestyle=(0, (4, 3)))
        axes.step(curve.x, curve.y, where="pre", color=LINE, linewidth=1.8)

    return svg_chart(draw, name=name, salt="precision-recall", size=(3.3, 2.8))


def reliability_chart(bins: Sequence[ReliabilityBin], *, name: str) -> str:
    """The reliability diagram as an ``<svg>`` element: a bar of the share that was right per bin, against the diagonal,
    and below it how many images a bin has.
    """
    used = [b for b in bins if b.high > 0.5]
    middle = [(b.low + b.high) / 2 for b in used]
    width = 0.9 * (used[0].high - used[0].low)

    def draw(figure: Figure) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        upper.bar(middle, [b.accuracy or 0 for b in used], width=width, color=LINE, alpha=0.45)
        full = [(b.confidence, b.accuracy) for b in used if b.count]
        upper.plot(*zip(*full, strict=True), "o", color=LINE, markersize=3.5)
        upper.plot([0.5, 1], [0.5, 1], color=INK, linewidth=1, linestyle=(0, (4, 3)))
        upper.set(ylim=(0, 1.03), ylabel="share right")
        lower.bar(middle, [b.count for b in used], width=width, color=GREY)
        lower.set(xlim=(used[0].low - 0.01, 1.01), xlabel="confidence", ylabel="images")
        for axes in (upper, lower):
            clean(axes)
        for axis in (upper.yaxis, upper.xaxis):
            _in_percent(axis)

    return svg_chart(draw, name=name, salt="reliability", size=(3.3, 2.8))


def robustness_chart(kind: str, points: Sequence[CurvePoint], *, name: str) -> str:
    """Accuracy with its interval, balanced accuracy and AUC by level as an ``<svg>`` element, undisturbed first."""
    places = list(range(len(points)))
    low, high = zip(*(p.accuracy_interval for p in points), strict=True)
    lines = [
        ("AUC", [p.roc_auc for p in points], GOOD, "^:"),
        ("balanced accuracy", [p.balanced_accuracy for p in points], GREY, "s--"),
        ("accuracy", [p.accuracy for p in points], LINE, "o-"),
    ]
    lines = [line for line in lines if None not in line[1]]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.fill_between(places, low, high, color=LINE, alpha=0.15, linewidth=0)
        for label, values, colour, style in lines:
            axes.plot(places, values, style, color=colour, linewidth=1.6, markersize=3.5, label=label)
        axes.set_xticks(places, ["none" if p.level is None else f"{p.level:g}" for p in points])
        least = min(0.4, *low, *(min(values) for _, values, _, _ in lines))
        axes.set(ylim=(least - 0.03, 1.03), xlabel=KINDS[kind].axis)
        _in_percent(axes.yaxis)
        figure.legend(frameon=False, fontsize=7.5, loc="outside upper left", ncols=3, handlelength=2.2)
        clean(axes)

    return svg_chart(draw, name=name, salt=f"robustness/{kind}", size=(3.3, 2.4))


def _shares(figure: Figure, x: str, y: str) -> matplotlib.axes.Axes:
    """Axes of two shares from 0 to 1."""
    axes = figure.add_subplot()
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.04), xlabel=x, ylabel=y)
    for axis in (axes.xaxis, axes.yaxis):
        _in_percent(axis)
    clean(axes)
    return axes


def _in_percent(axis: Axis) -> None:
    axis.set_major_formatter(PercentFormatter(1, decimals=0, symbol="\u00a0%"))
