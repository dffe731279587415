"""Fitting a ``Calibration`` to labelled images: temperature, threshold, unsure band.

- The *temperature* minimises the mean negative log-likelihood (Guo et al., 2017, arXiv 1706.04599), not of the labels
  but of Platt's smoothed ones (1999, "Probabilistic outputs for support vector machines", section 2.2): a real image
  counts as real to (N₊ + 1) / (N₊ + 2) and a fake one to 1 / (N₋ + 2), of N₊ real and N₋ fake images. So a few images
  that are told apart perfectly do not ask for certainty. Where even so no temperature is best, it stays 1.
- The *threshold* maximises balanced accuracy; or, with a limit to the false alarms (the share of real images that is
  called fake), it is the one that finds most fakes within the limit, and of those the one with fewest false alarms.
  All thresholds between two neighbouring probabilities of the data judge alike. Of several intervals that are equally
  good the widest is taken, the first if there are several, and the threshold is its middle.
- The *unsure band* is asked for by the accuracy that verdicts outside it must have on the data: the narrowest band with
  its middle at the threshold, in logits, that gives it. A threshold that is good enough by itself gets none.

Everything is measured on the data of the fit. On other images the numbers are somewhat worse, the less data the more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar

from unigendet.config import check
from unigendet.evaluation.reliability import calibration_error
from unigendet.inference.calibration import Calibration

LEAST_PER_LABEL = 10
TEMPERATURES = (0.05, 20.0)  # where logits say nothing of the labels, or the contrary, the best one has no bounds


def fit_calibration(
    logits: Sequence[float],
    labels: Sequence[int],
    *,
    max_false_alarms: float | None = None,
    confident_accuracy: float | None = None,
) -> Calibration:
    """The calibration of these images.

    Args:
        logits: per image, the head's logit of real less that of fake.
        labels: 1 = real, 0 = fake.
        max_false_alarms: largest share of real images that may be called fake, in [0, 1); None: balanced accuracy.
        confident_accuracy: least accuracy outside the unsure band, in (0.5, 1]; None: no band.

    Returns:
        A calibration whose ``measured`` holds ``before`` and ``after`` (see ``measure``), the counts of the images, and
        ``temperature_found``: whether there is a best temperature; if not, it is 1.

    Raises:
        ValueError: the arguments do not fit; fewer than ten images of a label; no band reaches the accuracy.
    """
    check_request(labels, max_false_alarms=max_false_alarms, confident_accuracy=confident_accuracy)
    z, real = np.asarray(logits, np.float64), np.asarray(labels)
    check(z.shape == real.shape, "logits", f"of shape {list(z.shape)}", f"one per label, {list(real.shape)}")
    check(bool(np.isfinite(z).all()), "logits", "not finite in places", "finite")
    counts, real = {"real": int(real.sum()), "fake": int((1 - real).sum())}, real.astype(bool)
    temperature = fit_temperature(z, real)
    found = not at_limit(temperature)
    fitted = Calibration(temperature if found else 1.0)
    probabilities = np.array([fitted.probability(x) for x in z])
    fitted = dataclasses.replace(fitted, threshold=best_threshold(probabilities, real, max_false_alarms))
    if confident_accuracy is not None:
        band = unsure_band(probabilities, real, fitted.threshold, confident_accuracy)
        fitted = dataclasses.replace(fitted, unsure=band)
    measured = counts | {"temperature_found": found}
    measured |= {"before": measure(Calibration(), z, real), "after": measure(fitted, z, real)}
    return dataclasses.replace(fitted, measured=measured)


def check_request(
    labels: Sequence[int], *, max_false_alarms: float | None = None, confident_accuracy: float | None = None
) -> None:
    """Raise ValueError for what ``fit_calibration`` cannot do, before there are logits."""
    unknown = sorted(set(labels) - {0, 1})
    check(not unknown, "labels", unknown, "1 (real) or 0 (fake)")
    for label, name in ((1, "real"), (0, "fake")):
        count = sum(one == label for one in labels)
        need = f"at least {LEAST_PER_LABEL} for a calibration, and several hundred for a good one"
        check(count >= LEAST_PER_LABEL, f"the number of {name} images", count, need)
    limit, accuracy = max_false_alarms, confident_accuracy
    check(limit is None or 0 <= limit < 1, "max_false_alarms", limit, "a share in [0, 1)")
    check(accuracy is None or 0.5 < accuracy <= 1, "confident_accuracy", accuracy, "a share in (0.5, 1]")


def fit_temperature(logits: np.ndarray, real: np.ndarray) -> float:
    """The temperature of the module's docstring, within ``TEMPERATURES``. ``logits`` [N], ``real`` bool [N]."""
    count = int(real.sum())
    targets = np.where(real, (count + 1) / (count + 2), 1 / (len(real) - count + 2))

    def loss(log_temperature: float) -> float:
        return _negative_log_likelihood(logits / math.exp(log_temperature), targets)

    # Convex in 1 / temperature, so there is one minimum in its logarithm too.
    bounds = tuple(math.log(t) for t in TEMPERATURES)
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-8}).x)


def at_limit(temperature: float) -> bool:
    """Whether a fitted temperature is one of the ends of ``TEMPERATURES``: the data do not determine it."""
    return any(abs(math.log(temperature / limit)) < 1e-3 for limit in TEMPERATURES)


def best_threshold(probabilities: np.ndarray, real: np.ndarray, max_false_alarms: float | None = None) -> float:
    """The threshold of the module's docstring. ``probabilities`` of real [N]; ``real`` bool [N], with both labels."""
    values = np.unique(probabilities)
    # Interval i lies above values[i - 1] and reaches up to values[i]; images from values[i] on are called real.
    ends = np.concatenate([[0.0], values, [1.0]])
    low, high = ends[:-1], ends[1:]
    alarms = np.searchsorted(np.sort(probabilities[real]), values, "left")  # real images below values[i]
    caught = np.searchsorted(np.sort(probabilities[~real]), values, "left")
    alarms = np.append(alarms, real.sum()) / real.sum()
    caught = np.append(caught, (~real).sum()) / (~real).sum()
    possible = np.append(np.full(len(values), True), values[-1] < 1)  # no threshold lies above a probability of 1
    if max_false_alarms is None:
        score = np.where(possible, caught - alarms, -2)  # twice the balanced accuracy, less one
        best = score >= score.max() - 1e-12
    else:
        allowed = possible & (alarms <= max_false_alarms)
        best = allowed & (caught == caught[allowed].max())
        best &= alarms == alarms[best].min()
    chosen = np.flatnonzero(best)[np.argmax((high - low)[best])]
    return float((low[chosen] + high[chosen]) / 2)


def unsure_band(
    probabilities: np.ndarray, real: np.ndarray, threshold: float, accuracy: float
) -> tuple[float, float] | None:
    """The band of the module's docstring; None where no image need be left out.

    Raises ValueError if no band reaches ``accuracy`` with an image outside it.
    """
    centre = _logit(np.array([threshold]))[0]
    distance = np.abs(_logit(probabilities) - centre)
    order = np.argsort(distance, kind="stable")[::-1]  # farthest first
    right = ((probabilities >= threshold) == real)[order]
    share = np.cumsum(right) / np.arange(1, len(right) + 1)  # accuracy over the k + 1 farthest
    distance = distance[order]
    whole = np.append(distance[1:] < distance[:-1], True)  # images at one distance are in or out together
    enough = np.flatnonzero(whole & (share >= accuracy))
    if not len(enough):
        reached = share[whole].max()
        raise ValueError(
            f"confident_accuracy is {accuracy}; outside the best band of these images it is {reached:.4f}: ask for less"
        )
    last = enough[-1]
    if last == len(right) - 1:
        return None
    edge = (distance[last] + distance[last + 1]) / 2  # between the last image outside and the first inside
    low, high = (Calibration().probability(float(centre + sign * edge)) for sign in (-1, 1))
    return min(low, threshold), max(high, threshold)


def measure(calibration: Calibration, logits: np.ndarray, real: np.ndarray) -> dict[str, Any]:
    """What a calibration does on labelled images. ``logits`` [N], ``real`` bool [N].

    ``nll``: mean negative log-likelihood, in nats. ``ece``: ``reliability.calibration_error``. ``accuracy``,
    ``balanced_accuracy``, ``false_alarms`` (share of real images below the threshold), ``missed_fakes`` (share of fakes
    from it on): of the threshold alone. ``unsure``: the share in the band; ``confident_accuracy``: accuracy outside it,
    None if nothing is.
    """
    p = np.array([calibration.probability(x) for x in logits])
    verdicts = [calibration.verdict(x) for x in p]
    outside = np.array([verdict is not None for verdict in verdicts])
    called = p >= calibration.threshold
    right = called == real
    alarms, missed = float((~called)[real].mean()), float(called[~real].mean())
    return {
        "nll": _negative_log_likelihood(logits / calibration.temperature, real),
        "ece": calibration_error(p, real),
        "accuracy": float(right.mean()),
        "balanced_accuracy": 1 - (alarms + missed) / 2,
        "false_alarms": alarms,
        "missed_fakes": missed,
        "unsure": float((~outside).mean()),
        "confident_accuracy": float(right[outside].mean()) if outside.any() else None,
    }


def _negative_log_likelihood(scaled: np.ndarray, real: np.ndarray) -> float:
    """``real``: labels, or probabilities of being real, [N]."""
    return float((real * np.logaddexp(0, -scaled) + (1 - real) * np.logaddexp(0, scaled)).mean())


def _logit(probabilities: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(probabilities) - np.log1p(-probabilities)
