"""How far probabilities can be believed: calibration error, Brier score and the data of a reliability diagram.

The probability of *real* makes a two-class prediction: its class is the likelier one (real at exactly one half) and its
confidence that class's probability, so at least one half. Where a threshold or an unsure band moves the verdict, this
does not move with it: it is the probability that is judged here.

Images are put into 15 bins of equal width over confidences from 0 to 1, a bin without its lower and with its upper end.
The *expected calibration error* is the mean over the bins, weighted by their numbers of images, of the distance between
the share that was right and the mean confidence (Naeini et al. 2015, with the binning of Guo et al. 2017).
The *Brier score* is the mean of (probability of real − label)²; 0.25 is what saying one half all the time gets.

An image without a probability, in a run whose other images have one, was surely wrong: confidence 1 in the wrong class.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unigendet.config import check

BINS = 15


@dataclass(frozen=True)
class ReliabilityBin:
    """One bar of a reliability diagram: confidences in (``low``, ``high``], ``count`` images with the mean
    ``confidence`` of which the share ``accuracy`` was right; both None in an empty bin.
    """

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None


def reliability_bins(probability: ArrayLike, label: ArrayLike) -> tuple[ReliabilityBin, ...]:
    """The bins, from low confidence to high.

    Args:
        probability: [N] of real, in [0, 1]; NaN for an image without one.
        label: [N], 1 real or 0 fake.

    Raises:
        ValueError: the two have other shapes, or a probability lies outside.
    """
    p, y = _checked(probability, label)
    confidence, right = np.maximum(p, 1 - p), (p >= 0.5) == (y == 1)
    edges = np.linspace(0, 1, BINS + 1)
    place = np.digitize(confidence, edges[1:-1], right=True)
    bins = []
    for i in range(BINS):
        inside = place == i
        means = [float(values[inside].mean()) for values in (confidence, right)] if inside.any() else [None, None]
        bins.append(ReliabilityBin(float(edges[i]), float(edges[i + 1]), int(inside.sum()), *means))
    return tuple(bins)


def calibration_error(probability: ArrayLike, label: ArrayLike) -> float:
    """The expected calibration error in [0, 1]; arguments and errors as in ``reliability_bins``, N at least 1."""
    bins = [b for b in reliability_bins(probability, label) if b.count]
    total = sum(b.count for b in bins)
    check(total > 0, "probability", [], "of at least one image")
    return sum(b.count * abs(b.accuracy - b.confidence) for b in bins) / total


def brier_score(probability: ArrayLike, label: ArrayLike) -> float:
    """The Brier score in [0, 1]; arguments and errors as in ``calibration_error``."""
    p, y = _checked(probability, label)
    check(len(p) > 0, "probability", [], "of at least one image")
    return float(np.mean((p - y) ** 2))


def _checked(probability: ArrayLike, label: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both as arrays; a missing probability as the worst one."""
    p, y = np.asarray(probability, np.float64), np.asarray(label, np.float64)
    check(p.ndim == 1 and p.shape == y.shape, "probability.shape", p.shape, f"the label's, {y.shape}, and 1-D")
    check(bool(np.isin(y, (0, 1)).all()), "label", y.tolist(), "1 (real) or 0 (fake) throughout")
    missing = np.isnan(p)
    check(bool(((p >= 0) & (p <= 1) | missing).all()), "probability", p.tolist(), "in [0, 1] or NaN throughout")
    return np.where(missing, 1 - y, p), y
