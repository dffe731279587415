"""The report of a detector's evaluation: curves against scikit-learn, the page, the JSON, what is told of odd runs."""

import io
import json
import re

import numpy as np
import pytest
from detectors import BrightnessDetector, write_images
from rich.console import Console
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score, roc_curve
from test_report import ENVIRONMENT, Page

from unigendet.evaluation.detection import DetectionOutcome, evaluate_detection
from unigendet.evaluation.detection_curves import detector_curves, reliability_chart
from unigendet.evaluation.detection_report import (
    DetectionReport,
    format_detection,
    make_report,
    write_detection_report,
)
from unigendet.evaluation.detection_run import Predictions, RunSettings, complete, prepare_folder
from unigendet.evaluation.figures import MAX_POINTS
from unigendet.evaluation.pages import percent
from unigendet.evaluation.reliability import reliability_bins
from unigendet.evaluation.robustness import Disturbance

HOW = RunSettings(disturbances=(Disturbance("jpeg", 75), Disturbance("resize", 0.5), Disturbance("blur", 2)))


def outcomes(count=300, seed=0, missing=()):
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        label = int(rng.random() < 0.4)
        p = None if i in missing else float(np.round(rng.beta(2 + 2 * label, 4 - 2 * label), 2))
        verdict = None if p is None else int(p >= 0.5)
        group = "real" if label else ("gan", "sd")[i % 2]
        made.append(DetectionOutcome(f"{i}.png", group, label, verdict, p))
    return made


def report_of(made, **parts):
    return DetectionReport("Detection", made, evaluate_detection(made), len(made), environment=ENVIRONMENT, **parts)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Of the brightness detector, on nine images and one that cannot be read."""
    base = tmp_path_factory.mktemp("reported")
    root = base / "data"
    records = write_images(root)
    records[5].image.write_bytes(b"no image")
    predictions = Predictions(prepare_folder(base / "out", {"model": "", "data": "", "settings": {}}), records, root)
    complete(predictions, records, HOW, BrightnessDetector, root=root)
    settings = {"model": {"folder": "m<odel"}, "max_tokens": None}
    return make_report(
        predictions, records, HOW, title="Detection by m<odel", available=20, settings=settings, environment=ENVIRONMENT
    )


@pytest.fixture(scope="module")
def folder(report, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    assert write_detection_report(folder, report) == folder / "evaluation.html"
    return folder


@pytest.fixture(scope="module")
def html(folder):
    return (folder / "evaluation.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def data(folder):
    return json.loads((folder / "evaluation.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)


def test_curves_are_scikit_learn_s():
    made = outcomes()
    is_fake = np.array([o.label == 0 for o in made])
    rank = 1 - np.array([o.probability for o in made])
    curves = detector_curves(made)
    x, y, _ = roc_curve(is_fake, rank)
    assert (curves["roc"].x, curves["roc"].y) == (tuple(x), tuple(y))
    assert auc(curves["roc"].x, curves["roc"].y) == pytest.approx(roc_auc_score(is_fake, rank))
    precision, recall, _ = precision_recall_curve(is_fake, rank)
    found = curves["precision_recall"]
    assert set(zip(found.x, found.y, strict=True)) <= set(zip(recall, precision, strict=True))
    average = average_precision_score(is_fake, rank)
    steps = np.diff(found.x)
    assert steps @ np.array(found.y)[1:] == pytest.approx(average, abs=1e-12)  # as the chart draws them
    assert steps @ np.array(found.y)[:-1] != pytest.approx(average, abs=1e-3)


def test_long_curves_are_thinned_with_their_ends():
    rng = np.random.default_rng(0)
    made = [DetectionOutcome(str(i), "g", i % 2, 1, float(rng.random())) for i in range(5000)]
    for curve in detector_curves(made).values():
        assert len(curve.x) == len(curve.y) == MAX_POINTS
        assert list(curve.x) == sorted(curve.x)
        assert (curve.x[0], curve.x[-1]) == (0.0, 1.0)


@pytest.mark.parametrize(
    "made",
    [[o for o in outcomes() if o.label == 0], [DetectionOutcome("a", "g", 0, 0), DetectionOutcome("b", "g", 1, 1)]],
)
def test_no_curves_without_both_classes_and_probabilities(made):
    assert detector_curves(made) == {"roc": None, "precision_recall": None}


def test_page_needs_nothing_but_itself(html):
    page = Page(html)
    assert page.tags.isdisjoint({"script", "link", "iframe", "object", "base"})
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.addresses)
    assert all(reference.startswith("#") for reference in re.findall(r"url\(([^)]*)\)", html))
    assert "prefers-color-scheme: dark" in html
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    assert re.findall(r'(?:fill|stroke)[:=]"? ?#0[0-9a-f]{5}', html) == []  # no colour that only stands for another


def test_page_shows_every_part(html, report):
    page, overall = Page(html), report.summary.overall
    for text in ("Detection by m<odel", "9 images: 4 real, 5 fake.", "Only 9 of the data set's 20 images were judged",
                 "Images that could not be judged: 1. They count as wrong.", "Confusion table", "Calibration",
                 "Brier score", "Disturbed images", "JPEG compression", "Smaller images", "Blurred images",
                 "Explanations",
                 "No sentence encoder was given", "TF-IDF cosine", "The first right and wrong verdicts of every group",
                 "Images that could not be judged", "gan/1.png", "0123456789abcdef+changes"):  # fmt: skip
        assert text in page.text
    for value in (overall.accuracy, overall.balanced_accuracy, overall.roc_auc, overall.average_precision,
                  overall.calibration_error, overall.rouge_l, overall.tfidf_cosine, overall.agreement):  # fmt: skip
        assert percent(value) in html
    labels = re.findall(r'<svg role="img" aria-label="([^"]*)"', html)
    assert len(labels) == 3 + 3
    assert "Share of right verdicts by confidence" in labels
    assert len(page.images) == len(report.examples) == 7


def test_examples_are_the_first_of_every_group(report):
    shown = [(e.outcome.name, e.outcome.correct) for e in report.examples]
    assert shown == [
        ("real/0.png", True), ("real/1.png", True), ("real/2.png", False),
        ("gan/0.png", True), ("gan/2.png", False),
        ("sd/0.png", True), ("sd/1.png", True),
    ]  # fmt: skip
    assert report.examples[0].image.shape == (8, 8, 3)
    assert (report.examples[0].image == 200).all()


def test_json(data, report):
    assert list(data) == [
        "schema", "kind", "title", "summary", "notes", "environment", "settings", "explanation_measures", "detection",
        "reliability", "roc", "precision_recall", "robustness", "unreadable", "examples",
    ]  # fmt: skip
    assert (data["schema"], data["kind"]) == (1, "detection")
    assert data["explanation_measures"] == {"rouge_l": True, "tfidf_cosine": True, "css": None}
    overall = data["detection"]["overall"]
    assert (overall["count"], overall["unreadable"], overall["css"]) == (9, 1, None)
    assert overall["accuracy"] == report.summary.overall.accuracy == pytest.approx(6 / 9)
    assert overall["accuracy_interval"] == list(report.summary.overall.accuracy_interval)
    assert [g["group"] for g in data["detection"]["groups"]] == ["real", "gan", "sd"]
    assert sum(b["count"] for b in data["reliability"]) == 9
    points = data["robustness"]["jpeg"]
    assert [p["level"] for p in points] == [None, 75]
    assert points[0]["accuracy"] == overall["accuracy"]
    assert list(data["robustness"]) == ["jpeg", "resize", "blur"]
    # Plain grey images: smaller and blurred ones have the same brightness.
    assert (
        data["robustness"]["blur"][1]["accuracy"]
        == data["robustness"]["resize"][1]["accuracy"]
        == points[0]["accuracy"]
    )
    assert data["unreadable"][0]["name"] == "gan/1.png"
    assert data["environment"] == ENVIRONMENT


def test_same_report_same_bytes(folder, report, tmp_path):
    write_detection_report(tmp_path, report)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.html", "evaluation.json"]
    for path in folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_one_class_only(tmp_path):
    made = [o for o in outcomes() if o.label == 0]
    page = Page(write_detection_report(tmp_path, report_of(made)).read_text(encoding="utf-8"))
    assert "All images are fake. Balanced accuracy, F1, AP and AUC need real ones too" in page.text
    data = json.loads((tmp_path / "evaluation.json").read_text())
    assert (data["detection"]["overall"]["roc_auc"], data["roc"]) == (None, None)
    assert "Reliability" in page.text  # a probability can be judged on one class


def test_verdicts_without_probabilities(tmp_path):
    made = [
        DetectionOutcome(str(i), "g", i % 2, 1, None, "This is a real image.", "This is a fake image.")
        for i in range(4)
    ]
    report = report_of(made, has_head=False)
    page = Page(write_detection_report(tmp_path, report).read_text(encoding="utf-8"))
    assert "The model has no real/fake head: there are no probabilities" in page.text
    assert "Reliability" not in page.text
    assert json.loads((tmp_path / "evaluation.json").read_text())["reliability"] is None


def test_unreadable_images_say_nothing_of_the_model():
    made = [DetectionOutcome(str(i), "g", i % 2, None, error="damaged") for i in range(4)]
    assert report_of(made).to_dict()["notes"] == ["Images that could not be judged: 4. They count as wrong."]


def test_unsure_verdicts_are_told(tmp_path):
    made = [
        DetectionOutcome(str(i), "g", i % 2, None if i < 4 else i % 2 if i < 8 else 1 - i % 2, 0.5) for i in range(10)
    ]
    (note,) = report_of(made).to_dict()["notes"]
    assert note.replace("\u00a0", " ") == (
        "4 images lie within the calibration's unsure band and count as wrong. 66.7 % of the 6 others with a verdict "
        "were judged right."
    )
    (note,) = report_of(made[:4]).to_dict()["notes"]
    assert note == "4 images lie within the calibration's unsure band and count as wrong."


def test_sentence_encoder_is_named(tmp_path):
    made = [DetectionOutcome(str(i), "g", i % 2, 1, 0.6, "a real one", "a fake one") for i in range(2)]
    encoder = {"name": "tiny", "weights_sha256": "abc", "max_tokens": 10}
    report = DetectionReport("t", made, evaluate_detection(made, css=[0.25, 0.35]), 2, encoder=encoder,
                             environment=ENVIRONMENT)  # fmt: skip
    page = Page(write_detection_report(tmp_path, report).read_text(encoding="utf-8"))
    assert "by the sentence encoder tiny" in page.text
    assert "30.0 %" in page.text
    data = json.loads((tmp_path / "evaluation.json").read_text())
    assert data["explanation_measures"]["css"] == encoder
    assert data["detection"]["overall"]["css"] == pytest.approx(0.3)


def test_text_is_escaped(tmp_path):
    evil = '<script>alert("x")</script>&'
    made = [DetectionOutcome(evil, evil, 0, None, None, evil, evil, evil), DetectionOutcome("b", "c", 1, 1, 0.9)]
    report = DetectionReport(evil, made, evaluate_detection(made), 2, settings={evil: evil}, environment=ENVIRONMENT)
    html = write_detection_report(tmp_path, report).read_text(encoding="utf-8")
    assert "<script" not in html
    assert evil in Page(html).text


def test_reliability_chart_of_empty_bins():
    svg = reliability_chart(reliability_bins([0.99], [1]), name="x")
    Page(svg)
    assert "nan" not in svg.lower()


def test_terminal(report):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(format_detection(report))
    text = console.export_text().replace("\u00a0", " ")
    for part in ("Only 9 of", "gan", "overall", "jpeg 75", "blur 2", "calibration error", "Brier score"):
        assert part in text
