import math

import numpy as np
import pytest
from scipy import stats

from unigendet.evaluation.comparisons import METRICS, Comparison, compare, summarise, t_interval


def runs_of(**arms):
    """Metrics by (seed, arm): Fréchet distances, seed by seed, None for a run that is missing."""
    return {
        (seed, arm): {"frechet": value, "agreement": value / 100}
        for arm, values in arms.items()
        for seed, value in enumerate(values, 1)
        if value is not None
    }


def test_interval_of_student():
    """By hand: mean 3, s² = 2.5, t(4) at 97.5 % = 2.776445."""
    estimate = t_interval([1, 2, 3, 4, 5])
    half = 2.7764451051977987 * math.sqrt(2.5 / 5)
    assert (estimate.mean, estimate.count) == (3, 5)
    assert (estimate.low, estimate.high) == pytest.approx((3 - half, 3 + half), rel=1e-12)
    values = np.random.default_rng(0).normal(5, 2, 9)
    wanted = stats.t.interval(0.9, 8, loc=values.mean(), scale=stats.sem(values))
    estimate = t_interval(values.tolist(), 0.9)
    assert (estimate.low, estimate.high) == pytest.approx(wanted, rel=1e-12)


def test_interval_of_few_or_equal_values():
    one = t_interval([2.5])
    assert (one.mean, one.low, one.high, one.count) == (2.5, None, None, 1)
    same = t_interval([2.5, 2.5, 2.5])
    assert (same.low, same.high) == (2.5, 2.5)
    with pytest.raises(ValueError, match="values is"):
        t_interval([])
    with pytest.raises(ValueError, match="confidence is 1"):
        t_interval([1.0, 2.0], 1)


def test_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(1)
    estimates = [t_interval(rng.normal(7, 3, 5).tolist()) for _ in range(2000)]
    assert np.mean([e.low <= 7 <= e.high for e in estimates]) == pytest.approx(0.95, abs=0.015)


def test_differences_are_paired():
    rng = np.random.default_rng(2)
    level = rng.normal(40, 10, 6)
    arm, control = level + rng.normal(-1, 0.5, 6), level + rng.normal(0, 0.5, 6)
    found = compare(Comparison("a", "b", "frechet"), runs_of(a=arm, b=control), 0.99)
    test = stats.ttest_rel(arm, control)
    assert found["mean"] == pytest.approx((arm - control).mean())
    assert (found["low"], found["high"]) == pytest.approx(test.confidence_interval(0.95), rel=1e-9)
    assert (found["joint_low"], found["joint_high"]) == pytest.approx(test.confidence_interval(0.99), rel=1e-9)
    assert found["high"] - found["low"] < 4  # unpaired it would be about 26
    assert found["primary"] is True


def test_only_seeds_with_both_count_and_better_depends_on_the_metric():
    runs = runs_of(a=[30, 31, None, 33, 34], b=[32, 30, 31, 35, 34])
    found = compare(Comparison("a", "b", "frechet"), runs, None)
    assert (found["count"], found["better"], found["worse"]) == (4, 2, 1)  # the last is a tie
    assert found["mean"] == pytest.approx(np.mean([-2, 1, -2, 0]))
    assert (found["primary"], found["joint_low"], found["joint_high"]) == (False, None, None)
    found = compare(Comparison("a", "b", "agreement"), runs, None)
    assert (found["better"], found["worse"]) == (1, 2)
    runs[1, "a"]["frechet"] = None
    assert compare(Comparison("a", "b", "frechet"), runs, None)["count"] == 3
    assert compare(Comparison("a", "c", "frechet"), runs, None) is None
    assert compare(Comparison("a", "b", "rouge_l"), runs, None) is None


def test_summary():
    arms = [("a", ["b", "c"]), ("b", []), ("c", ["b"])]
    primary = [Comparison("c", "b", "agreement"), Comparison("a", "b", "frechet")]
    summary = summarise(arms, primary, runs_of(a=[1, 2], b=[3, 3]))
    assert summary["joint_confidence"] == pytest.approx(0.975)
    compared = [(c["arm"], c["control"], c["metric"], c["primary"]) for c in summary["comparisons"]]
    assert compared == [("a", "b", "frechet", True), ("a", "b", "agreement", False)]  # of c there is no run
    assert summary["estimates"]["a"].keys() == {"frechet", "agreement"}
    assert summary["estimates"]["a"]["frechet"]["mean"] == 1.5
    assert summary["estimates"]["c"] == {}


def test_the_alignment_term_is_not_compared():
    runs = {(seed, arm): {"alignment": 0.1 * seed} for seed in (1, 2) for arm in ("a", "b")}
    summary = summarise([("a", ["b"]), ("b", [])], [], runs)
    assert summary["comparisons"] == []
    assert summary["estimates"]["a"]["alignment"]["mean"] == pytest.approx(0.15)
    assert len({metric.name for metric in METRICS}) == len(METRICS)
