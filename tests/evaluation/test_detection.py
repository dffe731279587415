import json
import math

import pytest

from unigendet.data.datasets import parse_verdict
from unigendet.evaluation.detection import (
    DetectionOutcome,
    evaluate_detection,
    rouge_l,
    wilson_interval,
)


def outcome(group, label, verdict, probability=None, **texts):
    return DetectionOutcome(
        name=f"{group}-{label}", group=group, label=label, verdict=verdict, probability=probability, **texts
    )


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("This is a real image. The strokes are firm.", 1),
        ("This is a fake image.", 0),
        ("  this IS\n a   FAKE image, with speckle", 0),
        ("**This is a real image**", 1),
        ("", None),
        ("This is an image.", None),
        ("This is a realistic image.", None),
        ("This is a fake imagery.", None),
        ("I think this is a fake image.", None),
        ("This is a", None),
    ],
)
def test_parse_verdict(text, verdict):
    assert parse_verdict(text) == verdict


def test_by_hand():
    # Six images of two generators and three reals; one fake called real, one answer unparsed, one real called fake.
    outcomes = [
        outcome("real", 1, 1, 0.9),
        outcome("real", 1, 1, 0.8),
        outcome("real", 1, 0, 0.35),
        outcome("mixture", 0, 0, 0.1),
        outcome("mixture", 0, 1, 0.7),
        outcome("kernel", 0, None, 0.2),
    ]
    summary = evaluate_detection(outcomes)
    assert [g.group for g in summary.groups] == ["real", "mixture", "kernel"]
    overall = summary.overall
    assert (overall.count, overall.real, overall.fake, overall.unparsed, overall.borrowed_real) == (6, 3, 3, 1, 0)
    assert overall.accuracy == pytest.approx(3 / 6)
    assert overall.balanced_accuracy == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert overall.f1 == pytest.approx(
        2 * 1 / (2 * 1 + 1 + 2)
    )  # fakes found 1, reals called fake 1, fakes missed 2 (one unparsed)
    assert overall.f1_real == pytest.approx(2 * 2 / (2 * 2 + 2 + 1))
    assert overall.roc_auc == pytest.approx(
        (3 + 3 + 2) / 9
    )  # fakes at 0.1 and 0.2 beat all reals; the one at 0.7 beats 0.9 and 0.8
    assert overall.average_precision == pytest.approx((1 / 1 + 2 / 2 + 3 / 4) / 3)
    real, mixture, kernel = summary.groups
    assert real.accuracy == pytest.approx(2 / 3)
    assert (real.balanced_accuracy, real.f1, real.f1_real, real.average_precision, real.roc_auc) == (None,) * 5
    assert mixture.borrowed_real == 3
    assert mixture.accuracy == 0.5
    assert mixture.balanced_accuracy == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert kernel.accuracy == 0.0
    assert kernel.f1 == 0.0
    assert summary.confusion == {
        "real": {"real": 2, "fake": 1, "unparsed": 0},
        "fake": {"real": 1, "fake": 1, "unparsed": 1},
    }


def test_a_group_with_both_labels_is_scored_on_its_own():
    outcomes = [
        outcome("animal", 1, 1, 0.9),
        outcome("animal", 0, 0, 0.2),
        outcome("human", 1, 0, 0.1),
        outcome("human", 0, 0, 0.3),
    ]
    animal, human = evaluate_detection(outcomes).groups
    assert (animal.borrowed_real, animal.balanced_accuracy, animal.f1, animal.roc_auc) == (0, 1.0, 1.0, 1.0)
    assert (human.borrowed_real, human.balanced_accuracy, human.roc_auc) == (0, 0.5, 0.0)


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_only(label):
    overall = evaluate_detection([outcome("g", label, label, 0.5), outcome("g", label, 1 - label, 0.5)]).overall
    assert overall.accuracy == 0.5
    assert (overall.balanced_accuracy, overall.f1, overall.f1_real, overall.average_precision, overall.roc_auc) == (
        None,
    ) * 5


def test_all_unparsed_counts_as_all_wrong():
    overall = evaluate_detection([outcome("r", 1, None), outcome("f", 0, None)]).overall
    assert (overall.count, overall.unparsed, overall.accuracy, overall.balanced_accuracy) == (2, 2, 0.0, 0.0)
    assert (overall.f1, overall.f1_real) == (0.0, 0.0)
    assert (overall.average_precision, overall.roc_auc) == (None, None)  # no probability at all: there is no ranking


@pytest.mark.parametrize("label", [0, 1])
def test_a_missing_probability_ranks_worst(label):
    surest_wrong = [outcome("r", 1, 1, 0.9), outcome("f", 0, 0, 0.1), outcome("x", label, None, float(1 - label))]
    missing = [*surest_wrong[:2], outcome("x", label, None)]
    assert evaluate_detection(missing).overall.roc_auc == evaluate_detection(surest_wrong).overall.roc_auc == 0.5


@pytest.mark.parametrize("missing", [0, 1])
def test_a_temperature_moves_no_rank(missing):
    logits, labels = [60.0, 50.0, 45.0, 41.0, 3.0, -2.0], [1, 0, 1, 0, 1, 0]  # from 37 on, the sigmoid is exactly 1

    def metrics(temperature, by_logit=True):
        made = [
            outcome("g", label, 1, 1 / (1 + math.exp(-logit / temperature)), logit=logit if by_logit else None)
            for logit, label in zip(logits, labels, strict=True)
        ]
        overall = evaluate_detection([*made, *[outcome("g", 0, None)] * missing]).overall
        return overall.roc_auc, overall.average_precision

    assert metrics(1.0) == metrics(50.0) == metrics(50.0, by_logit=False)
    assert metrics(1.0)[0] == pytest.approx((1 + 2 + 3) / 9 if not missing else 6 / 12)
    assert metrics(1.0, by_logit=False) != metrics(1.0)  # which is why the logits are kept


def test_accuracy_and_agreement_of_the_decided():
    real, fake = "This is a real image.", "This is a fake image."
    made = [
        outcome("a", 1, 1, 0.9, explanation=real),
        outcome("a", 0, 1, 0.8, explanation=fake),
        outcome("a", 0, 0, 0.1, explanation=fake),
        outcome("a", 1, None, 0.5, explanation=real),  # unsure
        outcome("b", 0, None, error="damaged"),
    ]
    summary = evaluate_detection(made)
    overall, (_, unjudged) = summary.overall, summary.groups
    assert (overall.count, overall.decided, overall.accuracy) == (5, 3, 2 / 5)
    assert (overall.decided_accuracy, overall.agreement) == (2 / 3, 2 / 3)
    assert (unjudged.decided, unjudged.decided_accuracy, unjudged.agreement) == (0, None, None)


def test_rouge_l():
    assert rouge_l("the edges are soft", "the edges are soft") == 1.0
    assert rouge_l("the soft edges", "the edges are soft") == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert rouge_l("edge", "edges") == 0.0  # no stemming
    outcomes = [
        outcome("g", 0, 0, explanation="soft edges", reference="soft edges"),
        outcome("g", 0, 0, explanation="", reference="soft edges"),  # silence scores 0 ...
        outcome("g", 1, 1, explanation="anything"),  # ... but without a reference there is nothing to score
    ]
    overall = evaluate_detection(outcomes).overall
    assert (overall.explained, overall.rouge_l) == (2, 0.5)
    assert evaluate_detection(outcomes[2:]).overall.rouge_l is None


def test_wilson_interval():
    low, high = wilson_interval(81, 263)  # Newcombe 1998, table I: 81 of 263 → 0.2553 to 0.3662
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson_interval(0, 20) == (0.0, pytest.approx(0.1611, abs=1e-4))
    assert wilson_interval(5, 5)[1] == 1.0
    with pytest.raises(ValueError, match="count is 0"):
        wilson_interval(0, 0)


def test_json_has_no_nan():
    for outcomes in (
        [outcome("g", 0, None)],
        [outcome("g", 1, 1, 0.4)],
        [outcome("g", 1, None), outcome("h", 0, 0, 0.1)],
    ):
        json.dumps(evaluate_detection(outcomes).to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("field", "value"),
    [("label", 2), ("verdict", -1), ("probability", 1.5), ("probability", math.nan), ("logit", math.inf)],
)
def test_bad_outcomes_name_the_field(field, value):
    with pytest.raises(ValueError, match=f"{field} is"):
        DetectionOutcome(**{"name": "a", "group": "g", "label": 1, "verdict": 1, field: value})


def test_no_outcomes():
    with pytest.raises(ValueError, match="at least one outcome"):
        evaluate_detection([])
