"""Calibration error and Brier score against a formula written another way, and by hand."""

import math

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss

from unigendet.evaluation.reliability import BINS, brier_score, calibration_error, reliability_bins


def plain_error(probability, label):
    """The definition image by image: which bin, in exact fifteenths; no histogram, no weights."""
    bins = {}
    for p, y in zip(probability, label, strict=True):
        confidence, right = (p, y == 1) if p >= 0.5 else (1 - p, y == 0)
        bins.setdefault(math.ceil(confidence * 15), []).append((confidence, right))
    total = 0.0
    for members in bins.values():
        total += abs(sum(confidence - right for confidence, right in members))
    return total / len(probability)


@pytest.mark.parametrize("count", [1, 7, 5000])
def test_against_another_way_of_writing_it(count):
    rng = np.random.default_rng(count)
    probability, label = rng.beta(0.6, 0.8, count), rng.integers(0, 2, count)
    assert calibration_error(probability, label) == pytest.approx(plain_error(probability, label), abs=1e-12)
    assert brier_score(probability, label) == pytest.approx(brier_score_loss(label, probability, labels=[0, 1]))


def test_by_hand():
    # Confidences 0.9, 0.9, 0.9, 0.6: the bins (0.867, 0.933] with 2 of 3 right and (0.533, 0.6] with none of 1.
    probability, label = [0.9, 0.9, 0.1, 0.6], [1, 0, 0, 0]
    assert calibration_error(probability, label) == pytest.approx((3 * (0.9 - 2 / 3) + 1 * 0.6) / 4)
    assert brier_score(probability, label) == pytest.approx((0.01 + 0.81 + 0.01 + 0.36) / 4)
    full = [b for b in reliability_bins(probability, label) if b.count]
    assert [(b.count, b.confidence, b.accuracy) for b in full] == [
        (1, pytest.approx(0.6), 0.0),
        (3, pytest.approx(0.9), pytest.approx(2 / 3)),
    ]


def test_a_calibrated_detector_has_hardly_any_error_and_a_boastful_one_much():
    rng = np.random.default_rng(0)
    probability = rng.random(50_000)
    label = rng.random(50_000) < probability
    assert calibration_error(probability, label) < 0.01
    assert calibration_error(probability > 0.5, label) == pytest.approx(0.25, abs=0.01)  # sure, and right in 3 of 4


def test_bins():
    bins = reliability_bins([1.0, 0.0, 0.5], [1, 1, 1])
    assert len(bins) == BINS == 15
    assert [b.low for b in bins[1:]] == [b.high for b in bins[:-1]]
    assert (bins[0].low, bins[-1].high) == (0.0, 1.0)
    assert (bins[-1].count, bins[-1].accuracy) == (2, 0.5)  # both ends of the probability are full confidence
    assert (bins[7].count, bins[7].accuracy) == (1, 1.0)  # one half is the class real
    assert {(b.count, b.confidence, b.accuracy) for b in bins[:7]} == {(0, None, None)}


def test_a_missing_probability_was_surely_wrong():
    missing, worst = [0.8, math.nan, math.nan], [0.8, 0.0, 1.0]
    label = [1, 1, 0]
    assert reliability_bins(missing, label) == reliability_bins(worst, label)
    assert brier_score(missing, label) == brier_score(worst, label) == pytest.approx((0.04 + 1 + 1) / 3)


def test_errors():
    for arguments, message in (
        (([0.5], [1, 0]), r"probability\.shape is \(1,\)"),
        (([0.5], [2]), "label is"),
        (([1.5], [1]), "probability is"),
        (([], []), "at least one image"),
    ):
        for function in (calibration_error, brier_score):
            with pytest.raises(ValueError, match=message):
                function(*arguments)
