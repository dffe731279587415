"""Detection metrics: real/fake verdicts per generator or category, and the text quality of the explanations.

Conventions, each of which changes numbers, so each is stated once, here:

- Label and verdict 1 mean real, 0 mean fake; ``probability`` is that of *real*.
- *Fake is the positive class* of F1, average precision and ROC-AUC, since a detector's find is a fake. ``f1_real`` is
  F1 with real as the positive class (what a metric library computes from the raw labels); their mean is the macro F1.
- An answer that could not be parsed, or a request that failed, is a wrong verdict: it stays in every denominator. One
  without a probability ranks as the worst possible one (a fake: the surest real; a real: the surest fake).
- Images are ranked by their logits where all that have a probability have one: a probability is rounded to exactly 1
  where logits still differ. A temperature, which moves every probability and no order, so leaves average precision and
  ROC-AUC as they are.
- ``decided_accuracy`` is the share of right verdicts among the images that have a verdict, ``decided`` of them: the
  accuracy outside an unsure band. It leaves out what is hard, so it says nothing without ``decided``.
- A group with images of both labels (a FakeClue category) is scored on its own images. A group with fakes only (a
  generator) is set against *all* real images for balanced accuracy, F1, average precision and ROC-AUC. Its accuracy
  and ROUGE-L always cover its own images only.
  (F1 and average precision depend on the ratio of fakes to reals; balanced accuracy and ROC-AUC do not.)
- The verdict is the real/fake head's if the model has one; its answer says one too. ``agreement`` is the share of the
  images with a verdict whose answer begins with the verdict's sentence, ``text_accuracy`` the accuracy of the answers'
  own verdicts; an answer without such a sentence neither agrees nor is right. Both cover a group's own images; without
  a head there is nothing to agree with, without answers there is neither.
- ``calibration_error`` and ``brier`` (module ``reliability``) cover a group's own images.
- Explanations are compared with the annotations as wholes, by ROUGE-L, by the cosine of TF-IDF vectors and, if a
  sentence encoder has made them, by that of sentence embeddings (module ``explanations``). Silence scores 0.
- A metric that is undefined (a class is missing, nothing to compare) is None, never NaN or a made-up 0.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import average_precision_score, balanced_accuracy_score, f1_score, roc_auc_score

from unigendet.config import check
from unigendet.data.datasets import parse_verdict
from unigendet.evaluation.explanations import tfidf_cosines
from unigendet.evaluation.reliability import brier_score, calibration_error

REAL, FAKE = 1, 0


@dataclass(frozen=True)
class DetectionOutcome:
    """What the detector said about one image.

    ``name``: the image (a path or an id). ``group``: generator or category. ``label``: 1 real, 0 fake. ``verdict``: 1,
    0 or None (unparsed answer, failed request, or within an unsure band). ``probability`` of real in [0, 1], None if
    there is none. ``logit``: the uncalibrated one of real, if it is known. ``explanation``: the answer's text;
    ``reference``: the annotation it is compared with, "" if there is none. ``error``: why the image could not be
    judged.
    """

    name: str
    group: str
    label: int
    verdict: int | None
    probability: float | None = None
    explanation: str = ""
    reference: str = ""
    error: str | None = None
    logit: float | None = None

    def __post_init__(self) -> None:
        check(self.label in (REAL, FAKE), "label", self.label, "1 (real) or 0 (fake)")
        check(self.verdict in (REAL, FAKE, None), "verdict", self.verdict, "1 (real), 0 (fake) or None (unparsed)")
        p = self.probability
        check(p is None or (math.isfinite(p) and 0 <= p <= 1), "probability", p, "in [0, 1] or None")
        check(self.logit is None or math.isfinite(self.logit), "logit", self.logit, "finite or None")

    @property
    def correct(self) -> bool:
        """Whether the verdict is the label; never so without a verdict."""
        return self.verdict == self.label


@dataclass(frozen=True)
class DetectionMetrics:
    """The metrics of one group, or of everything; the module's docstring says how they are defined.

    ``count`` = ``real`` + ``fake`` images of the group itself; ``unparsed``: without a verdict, of which ``unreadable``
    could not be judged at all and ``unsure`` lie within a calibration's unsure band; ``decided``: the others;
    ``borrowed_real``: real images of other groups it was set against; ``accuracy_interval``: 95 % Wilson interval;
    ``explained``: images with a reference, over which ``rouge_l`` (mean ROUGE-L F-measure), ``tfidf_cosine`` and
    ``css`` (mean cosines) run.
    """

    group: str
    count: int
    real: int
    fake: int
    unparsed: int
    unreadable: int
    unsure: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    decided: int
    decided_accuracy: float | None
    borrowed_real: int
    balanced_accuracy: float | None
    f1: float | None
    f1_real: float | None
    average_precision: float | None
    roc_auc: float | None
    calibration_error: float | None
    brier: float | None
    agreement: float | None
    text_accuracy: float | None
    explained: int
    rouge_l: float | None
    tfidf_cosine: float | None
    css: float | None


@dataclass(frozen=True)
class DetectionSummary:
    """``overall``, one entry per group (in order of first appearance), and ``confusion``: label → verdict → count."""

    overall: DetectionMetrics
    groups: tuple[DetectionMetrics, ...]
    confusion: dict[str, dict[str, int]]

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts and lists, ready for JSON."""
        return dataclasses.asdict(self)


def wilson_interval(successes: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion: (low, high) in [0, 1].

    Raises ValueError unless 0 ≤ successes ≤ count, count > 0 and 0 < confidence < 1.
    """
    check(count > 0, "count", count, "positive")
    check(0 <= successes <= count, "successes", successes, f"between 0 and count ({count})")
    check(0 < confidence < 1, "confidence", confidence, "between 0 and 1")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / count
    centre = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    # At p = 0 and p = 1 the ends are exactly 0 and 1; rounding must not push them past.
    return (0.0 if successes == 0 else max(0.0, centre - half)), (
        1.0 if successes == count else min(1.0, centre + half)
    )


def rouge_l(explanation: str, reference: str) -> float:
    """ROUGE-L F-measure in [0, 1] of two texts (rouge-score, no stemming)."""
    return RougeScorer(["rougeL"], use_stemmer=False).score(reference, explanation)["rougeL"].fmeasure


def evaluate_detection(
    outcomes: Sequence[DetectionOutcome], *, css: Sequence[float | None] | None = None
) -> DetectionSummary:
    """All metrics of a run, over everything and per group.

    Args:
        outcomes: at least one.
        css: per outcome, the cosine of a sentence encoder (``explanations.SentenceEncoder.cosines``); None for those
            without a reference.

    Raises:
        ValueError: there are no outcomes, or ``css`` has another length.
    """
    check(len(outcomes) > 0, "outcomes", list(outcomes), "at least one outcome")
    check(css is None or len(css) == len(outcomes), "css", css, f"{len(outcomes)} numbers, one per outcome")
    # The slow part, so once per image and not once per table.
    scores = {
        "rouge_l": [rouge_l(o.explanation, o.reference) if o.reference else None for o in outcomes],
        "tfidf_cosine": tfidf_cosines([o.explanation for o in outcomes], [o.reference for o in outcomes]),
        "css": [None] * len(outcomes) if css is None else list(css),
    }
    everything = list(range(len(outcomes)))
    reals = [i for i in everything if outcomes[i].label == REAL]
    members: dict[str, list[int]] = {}
    for i, outcome in enumerate(outcomes):
        members.setdefault(outcome.group, []).append(i)
    return DetectionSummary(
        overall=_metrics("overall", outcomes, scores, everything, reals),
        groups=tuple(_metrics(group, outcomes, scores, own, reals) for group, own in members.items()),
        confusion=_confusion(outcomes),
    )


def _metrics(
    group: str,
    outcomes: Sequence[DetectionOutcome],
    scores: Mapping[str, Sequence[float | None]],
    own: list[int],
    reals: list[int],
) -> DetectionMetrics:
    real = sum(outcomes[i].label for i in own)
    borrowed = reals if real == 0 else []
    correct = sum(outcomes[i].correct for i in own)
    decided = sum(outcomes[i].verdict is not None for i in own)
    with_head = any(o.probability is not None for o in outcomes)
    p, label = probabilities([outcomes[i] for i in own]), [outcomes[i].label for i in own]
    texts = {name: [values[i] for i in own if values[i] is not None] for name, values in scores.items()}
    return DetectionMetrics(
        group=group,
        count=len(own),
        real=real,
        fake=len(own) - real,
        unparsed=len(own) - decided,
        unreadable=sum(outcomes[i].error is not None for i in own),
        unsure=sum(outcomes[i].verdict is None and outcomes[i].probability is not None for i in own),
        accuracy=correct / len(own),
        accuracy_interval=wilson_interval(correct, len(own)),
        decided=decided,
        decided_accuracy=correct / decided if decided else None,
        borrowed_real=len(borrowed),
        **_two_class_metrics([outcomes[i] for i in own + borrowed]),
        calibration_error=calibration_error(p, label) if with_head else None,
        brier=brier_score(p, label) if with_head else None,
        **_text_verdicts(outcomes, own, with_head),
        explained=len(texts["rouge_l"]),
        **{name: math.fsum(values) / len(values) if values else None for name, values in texts.items()},
    )


def probabilities(outcomes: Sequence[DetectionOutcome]) -> NDArray[np.float64]:
    """The probabilities of real, [N]; NaN where there is none."""
    return np.array([math.nan if o.probability is None else o.probability for o in outcomes])


def _text_verdicts(outcomes: Sequence[DetectionOutcome], own: list[int], with_head: bool) -> dict[str, float | None]:
    """``agreement`` and ``text_accuracy`` of the group's answers."""
    if not any(o.explanation for o in outcomes):
        return {"agreement": None, "text_accuracy": None}
    said = [(parse_verdict(outcomes[i].explanation), outcomes[i]) for i in own]
    agreed = [verdict == o.verdict for verdict, o in said if o.verdict is not None]
    right = sum(verdict == o.label for verdict, o in said) / len(own)
    return {"agreement": sum(agreed) / len(agreed) if with_head and agreed else None, "text_accuracy": right}


def fake_ranking(outcomes: Sequence[DetectionOutcome]) -> NDArray[np.float64] | None:
    """The images' places in the order from real to fake, [N], equal ones where they look equally fake: by logit where
    all that have a probability have one, else by probability. One without lies beyond all others, on the wrong side.
    None if there is no probability at all.
    """
    judged = [o for o in outcomes if o.probability is not None]
    if not judged:
        return None
    by_logit = all(o.logit is not None for o in judged)
    missing = np.array([o.probability is None for o in outcomes])
    places = np.array([len(outcomes) if o.label == REAL else -1 for o in outcomes], np.float64)
    fakeness = np.array([-o.logit if by_logit else -o.probability for o in judged])
    places[~missing] = np.unique(fakeness, return_inverse=True)[1]
    return places


def _two_class_metrics(outcomes: list[DetectionOutcome]) -> dict[str, float | None]:
    """The metrics that need both classes; all None if one is missing."""
    names = ("balanced_accuracy", "f1", "f1_real", "average_precision", "roc_auc")
    label = np.array([o.label for o in outcomes])
    if label.min() == label.max():
        return dict.fromkeys(names)
    verdict = np.array([1 - o.label if o.verdict is None else o.verdict for o in outcomes])
    # zero_division=0: no fake found among fakes that exist is an F1 of 0, not an undefined one.
    values = [balanced_accuracy_score(label, verdict)]
    values += [f1_score(label, verdict, pos_label=positive, zero_division=0) for positive in (FAKE, REAL)]
    rank = fake_ranking(outcomes)
    if rank is None:
        values += [None, None]
    else:
        values += [average_precision_score(label == FAKE, rank), roc_auc_score(label == FAKE, rank)]
    return {name: None if value is None else float(value) for name, value in zip(names, values, strict=True)}


def _confusion(outcomes: Sequence[DetectionOutcome]) -> dict[str, dict[str, int]]:
    words = {REAL: "real", FAKE: "fake", None: "unparsed"}
    table = {label: dict.fromkeys(words.values(), 0) for label in ("real", "fake")}
    for outcome in outcomes:
        table[words[outcome.label]][words[outcome.verdict]] += 1
    return table
