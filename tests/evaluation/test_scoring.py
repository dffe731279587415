"""The loop from records to a summary, and which records a limit leaves."""

from collections import Counter
from pathlib import Path

import pytest
from detectors import BrightnessDetector, write_images
from tiny_encoder import write_encoder

from unigendet.config import DataConfig
from unigendet.data.datasets import DetectionRecord
from unigendet.data.labelled import limit_evenly
from unigendet.evaluation.explanations import SentenceEncoder
from unigendet.evaluation.scoring import judge, summarise
from unigendet.inference.detect import Detection
from unigendet.quickstart import detect_records


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("scored"))


def record(i, label, category):
    return DetectionRecord(Path(f"{i}.png"), label, category, "", "")


def scored(detector, records, encoder=None, **options):
    return summarise(list(judge(detector, records, **options)), encoder)


def test_summary_of_a_detector(records):
    """Nine images, two of them wrong (levels 100 and 150); the answers are told by the levels."""
    summary = scored(BrightnessDetector(), records)
    overall = summary.overall
    assert (overall.count, overall.real, overall.fake, overall.unparsed) == (9, 4, 5, 0)
    assert overall.accuracy == pytest.approx(7 / 9)
    assert overall.balanced_accuracy == pytest.approx((3 / 4 + 4 / 5) / 2)
    assert overall.roc_auc == pytest.approx(19 / 20)  # of 4 × 5 pairs only (100, 150) is the wrong way round
    levels, labels = [200, 230, 100, 250, 20, 60, 150, 90, 10], [1] * 4 + [0] * 5
    assert overall.brier == pytest.approx(sum((v / 255 - y) ** 2 for v, y in zip(levels, labels, strict=True)) / 9)
    assert [g.accuracy for g in summary.groups] == [pytest.approx(x) for x in (3 / 4, 2 / 3, 1)]
    assert (overall.agreement, overall.text_accuracy) == (1.0, pytest.approx(7 / 9))
    assert overall.explained == 9
    assert 0.5 < overall.rouge_l < 1
    assert overall.css is None


def test_options_reach_the_detector(records):
    detector = BrightnessDetector()
    scored(detector, records, with_latent=False, max_new_tokens=9, batch_size=3)
    assert detector.calls == [
        {"question": [r.question for r in records], "transform": None, "with_latent": False, "max_new_tokens": 9,
         "batch_size": 3, "images": 9},
    ]  # fmt: skip
    scored(detector, limit_evenly(records, 4), question="Well?")
    assert (detector.calls[1]["question"], detector.calls[1]["images"]) == ("Well?", 4)


def test_a_record_without_a_question_leaves_it_to_the_detector(records):
    detector = BrightnessDetector()
    scored(detector, [record(records[0].image, 1, "real")])
    assert detector.calls[0]["question"] == [None]


def test_transform_comes_before_the_detector(records):
    outcomes = list(judge(BrightnessDetector(), records[:2], transform=lambda image: image.point(lambda v: 255 - v)))
    assert [o.probability for o in outcomes] == [pytest.approx(55 / 255), pytest.approx(25 / 255)]


def test_no_explanations_asked_for(records):
    overall = scored(BrightnessDetector(), records, max_new_tokens=0).overall
    assert overall.accuracy == pytest.approx(7 / 9)
    assert (overall.explained, overall.rouge_l, overall.tfidf_cosine) == (0, None, None)
    assert (overall.agreement, overall.text_accuracy) == (None, None)


def test_unreadable_images_are_wrong_everywhere(records, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    more = [
        *records,
        DetectionRecord(broken, 1, "real", "", "This is a real image."),
        record(tmp_path / "no", 0, "gan"),
    ]
    overall = scored(BrightnessDetector(), more).overall
    assert (overall.count, overall.unparsed, overall.unreadable, overall.explained) == (11, 2, 2, 10)
    assert overall.accuracy == pytest.approx(7 / 11)
    assert overall.balanced_accuracy == pytest.approx((3 / 5 + 4 / 6) / 2)
    assert (overall.agreement, overall.text_accuracy) == (1.0, pytest.approx(7 / 11))
    before = scored(BrightnessDetector(), records).overall
    assert overall.brier == pytest.approx((9 * before.brier + 2) / 11)  # surely wrong
    assert overall.rouge_l == pytest.approx(9 * before.rouge_l / 10)


def test_answers_without_a_verdict_are_wrong_without_a_head(records):
    detector = BrightnessDetector(has_head=False)
    overall = scored(detector, records).overall
    assert (overall.accuracy, overall.unparsed) == (pytest.approx(7 / 9), 0)
    assert (overall.roc_auc, overall.calibration_error, overall.brier, overall.agreement) == (None,) * 4
    overall = scored(detector, records, max_new_tokens=2).overall  # "This is a real i"
    assert (overall.accuracy, overall.unparsed, overall.text_accuracy) == (0.0, 9, 0.0)


def test_images_in_an_unsure_band_are_wrong_and_counted(records):
    class Unsure:
        def detect(self, images, **options):
            return (Detection(str(path), None, 0.55, "This is a real image.", unsure=True) for path in images)

    overall = scored(Unsure(), records).overall
    assert (overall.accuracy, overall.unparsed, overall.unsure, overall.unreadable) == (0.0, 9, 9, 0)
    assert overall.calibration_error == pytest.approx(abs(0.55 - 4 / 9))  # the probability is judged all the same


def test_text_that_disagrees_with_the_head(records):
    class TwoTongued:
        def detect(self, images, **options):
            answers = ("This is a real image.", "This is a fake image.", "Who knows?")
            return (Detection(str(path), True, 0.75, answers[i % 3]) for i, path in enumerate(images))

    overall = scored(TwoTongued(), records).overall
    assert overall.accuracy == pytest.approx(4 / 9)
    assert overall.agreement == pytest.approx(3 / 9)
    # The texts: real, fake, none, real | fake, none, real | fake, none. Right: 2 of the reals, 2 of the fakes.
    assert overall.text_accuracy == pytest.approx(4 / 9)


def test_names_are_relative_to_the_root(records):
    root = records[0].image.parent.parent
    assert [o.name for o in judge(BrightnessDetector(), records, root=root)][3:5] == ["real/3.png", "gan/0.png"]
    assert next(judge(BrightnessDetector(), records)).name == str(records[0].image)


def test_css_comes_from_the_encoder(records, tmp_path):
    write_encoder(tmp_path / "tiny")
    encoder = SentenceEncoder(tmp_path / "tiny")
    summary = scored(BrightnessDetector(), records, encoder=encoder)
    outcomes = list(judge(BrightnessDetector(), records))
    expected = encoder.cosines([o.explanation for o in outcomes], [o.reference for o in outcomes])
    assert summary.overall.css == pytest.approx(sum(expected) / 9)
    assert summary.groups[2].css == pytest.approx(sum(expected[7:]) / 2)


def chosen(records, limit):
    return Counter((r.label, r.category) for r in limit_evenly(records, limit))


def test_limit_is_even_over_labels_and_groups():
    records = [record(i, 1, "real") for i in range(100)]
    records += [record(100 + i, 0, group) for i, group in enumerate(["a"] * 50 + ["b"] * 3 + ["c"] * 50)]
    assert chosen(records, 40) == {(1, "real"): 20, (0, "a"): 8, (0, "b"): 3, (0, "c"): 9}
    assert chosen(records, 2) == {(1, "real"): 1, (0, "c"): 1}
    assert chosen(records, 1000) == chosen(records, None) == Counter((r.label, r.category) for r in records)
    for limit in range(1, 203):
        some = limit_evenly(records, limit)
        assert len(some) == len(set(some)) == limit
        assert some == sorted(some, key=records.index)
        assert some == limit_evenly(records, limit)


def test_limit_spreads_over_a_group_and_fills_up():
    records = [record(i, 1, "real") for i in range(10)] + [record(10, 0, "a")]
    assert [r.image.stem for r in limit_evenly(records, 6)] == ["0", "2", "4", "6", "8", "10"]
    one_label = [record(i, 0, "ab"[i % 2]) for i in range(10)]
    assert chosen(one_label, 4) == {(0, "a"): 2, (0, "b"): 2}
    with pytest.raises(ValueError, match="limit is 0; it must be positive"):
        limit_evenly(records, 0)


def test_nothing_to_score():
    with pytest.raises(ValueError, match="at least one outcome"):
        scored(BrightnessDetector(), [])


def test_a_run_s_own_records_are_judged_the_same_way(records, tmp_path):
    root = records[0].image.parents[1]
    detector = BrightnessDetector()
    detector.data = DataConfig(question="Well?")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    outcomes = detect_records(detector, records, root, with_latent=False, max_new_tokens=9, batch_size=3)
    expected = judge(
        BrightnessDetector(), records, root=root, question="Well?", with_latent=False, max_new_tokens=9, batch_size=3
    )
    assert outcomes == list(expected)
    assert detector.calls[0]["question"] == "Well?"
    (unread,) = detect_records(detector, [DetectionRecord(broken, 1, "real", "", "")], tmp_path, batch_size=3)
    assert (unread.verdict, "broken.png" in unread.error) == (None, True)
