"""Several seeds of several arms: means with their intervals, and differences of an arm from its control, seed by seed.

Intervals are Student's: mean ± t(n − 1) · s / √n over seeds, s with n − 1 in the denominator. A difference is *paired*:
it is taken within each seed, where arm and control share data, fakes and the weights they start from, and the interval
is that of the differences. Nothing is corrected for how many comparisons there are; the primary ones also get the wider
interval that covers all of them together (Bonferroni).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from scipy.stats import t as student

from unigendet.config import check


@dataclass(frozen=True)
class Metric:
    """A number of a run.

    ``kind`` says how to write it. ``meaning``: one sentence. ``compared``: whether its differences mean anything.
    """

    name: str
    title: str
    kind: Literal["percent", "number"]
    higher_is_better: bool
    meaning: str
    compared: bool = True


METRICS = (
    Metric("balanced_accuracy_held_out", "Balanced accuracy, held-out generator", "percent", True,
           "Real test digits against fakes of a generator that the detector has never met."),
    Metric("balanced_accuracy_seen", "Balanced accuracy, seen generator", "percent", True,
           "The same against the generator it was trained on."),
    Metric("auc_held_out", "AUC, held-out generator", "percent", True,
           "How well the probability alone ranks the fakes of the held-out generator before the real digits."),
    Metric("auc_seen", "AUC, seen generator", "percent", True, "The same for the generator it was trained on."),
    Metric("rouge_l", "Explanation ROUGE-L", "percent", True,
           "Overlap of the explanations with those measured on the images; after GDUF only."),
    Metric("frechet", "Fréchet distance", "number", False,
           "Of generated from real test digits, in 20 principal components; the mean over several draws."),
    Metric("agreement", "Prompt agreement", "percent", True,
           "Share of the generated digits that an SVM, trained on real digits, reads as prompted."),
    Metric("alignment", "Alignment term", "number", False,
           "1 − mean cosine of student and teacher, over the last training steps that had it. "
           "Arms with other teachers or layers measure different things with it.", compared=False),
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """A mean over ``count`` seeds and its interval; the ends are None with one seed."""

    mean: float
    low: float | None
    high: float | None
    count: int


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean and Student's interval of ``values``. Raises ValueError for no values or a confidence outside (0, 1)."""
    count = len(values)
    check(count > 0, "values", list(values), "at least one number")
    check(0 < confidence < 1, "confidence", confidence, "between 0 and 1")
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, None, None, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    half = float(student.ppf(0.5 + confidence / 2, count - 1)) * math.sqrt(variance / count)
    return Estimate(mean, mean - half, mean + half, count)


@dataclass(frozen=True)
class Comparison:
    """An arm against its control by one metric."""

    arm: str
    control: str
    metric: str


def compare(
    comparison: Comparison, runs: Mapping[tuple[int, str], Mapping[str, Any]], joint: float | None
) -> dict[str, Any] | None:
    """The paired difference, arm − control, over the seeds that have both; None if there is none.

    Args:
        comparison: what to compare.
        runs: metrics by (seed, arm).
        joint: confidence of the wider interval of a primary comparison; None: it is exploratory.

    Returns:
        The comparison's fields, ``primary``, the fields of its ``Estimate``, ``joint_low`` and ``joint_high`` (None if
        it is not primary), ``better`` and ``worse``: numbers of seeds in which the arm is better or worse.
    """
    (metric,) = (m for m in METRICS if m.name == comparison.metric)
    pairs = []
    for seed in sorted({seed for seed, _ in runs}):
        one, other = ((runs.get((seed, arm)) or {}).get(metric.name) for arm in (comparison.arm, comparison.control))
        if one is not None and other is not None:
            pairs.append(one - other)
    if not pairs:
        return None
    wide = None if joint is None else t_interval(pairs, joint)
    gains = [d if metric.higher_is_better else -d for d in pairs]
    return {
        **dataclasses.asdict(comparison),
        "primary": joint is not None,
        **dataclasses.asdict(t_interval(pairs)),
        "joint_low": wide.low if wide else None,
        "joint_high": wide.high if wide else None,
        "better": sum(gain > 0 for gain in gains),
        "worse": sum(gain < 0 for gain in gains),
    }


def summarise(
    arms: Sequence[tuple[str, Sequence[str]]],
    primary: Sequence[Comparison],
    runs: Mapping[tuple[int, str], Mapping[str, Any]],
) -> dict[str, Any]:
    """All means and differences of a study.

    Args:
        arms: (name, its controls), in the order of the report.
        primary: the comparisons that were named in advance; all others of an arm with its controls are exploratory.
        runs: metrics by (seed, arm); a metric that a run does not have is missing or None.

    Returns:
        ``estimates`` {arm: {metric: Estimate's fields}}, ``comparisons`` [see ``compare``], primary ones first, and
        ``joint_confidence``, that of the primary comparisons' wider interval.
    """
    estimates: dict[str, dict[str, Any]] = {}
    for arm, _ in arms:
        estimates[arm] = {}
        for metric in METRICS:
            own = [runs[key].get(metric.name) for key in sorted(runs) if key[1] == arm]
            if values := [value for value in own if value is not None]:
                estimates[arm][metric.name] = dataclasses.asdict(t_interval(values))
    joint = 1 - 0.05 / max(1, len(primary))
    compared = [compare(comparison, runs, joint) for comparison in primary]
    for arm, controls in arms:
        pairs = [Comparison(arm, control, metric.name) for control in controls for metric in METRICS if metric.compared]
        compared += [compare(comparison, runs, None) for comparison in pairs if comparison not in primary]
    return {
        "estimates": estimates,
        "comparisons": [entry for entry in compared if entry is not None],
        "joint_confidence": joint,
    }
