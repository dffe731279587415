import json
import re

import pytest
from study_demo import demo_study
from test_report import Page

from unigendet.evaluation.comparisons import METRICS
from unigendet.evaluation.figures import ForestRow, forest_plot
from unigendet.evaluation.study_report import difference, estimate, study_texts, value_text, write_study

METRIC = {metric.name: metric for metric in METRICS}


def test_page(tmp_path):
    study = demo_study()
    assert write_study(tmp_path, study) == json.loads((tmp_path / "study.json").read_text()) == study
    html = (tmp_path / "report.html").read_text()
    page = Page(html)
    assert "script" not in page.tags
    assert all(address.startswith("#") for address in page.addresses)  # self-contained
    for words in ("arm <one> against arm two", "4 better, 0 worse of 4", "Primary comparisons", "9 min 12 s", "18.5"):
        assert words in page.text, words
    assert len(re.findall("<svg", html)) == len({c["metric"] for c in study["comparisons"]})
    assert "prefers-color-scheme: dark" in html
    write_study(tmp_path, study)
    assert (tmp_path / "report.html").read_text() == html


def test_page_of_one_seed(tmp_path):
    write_study(tmp_path, demo_study(seeds=1))
    assert "one seed: no interval" in Page((tmp_path / "report.html").read_text()).text


def test_texts_of_a_study():
    texts = study_texts(demo_study())
    (primary,) = texts["primary"]
    assert primary["what"] == "arm <one> against arm two"
    assert primary["verdict"] == "better"
    assert [line["arm"] for line in texts["table"]["lines"]] == ["arm <one>", "arm two"]  # of three there is no run
    assert "Explanation ROUGE-L" not in texts["table"]["titles"]  # nobody has one
    compared = [m for m in METRICS if m.compared and m.name not in ("rouge_l", "frechet")]
    assert len(texts["exploratory"]) == texts["chance"]["count"] == len(compared)
    assert texts["chance"]["expected"] == "0.25"
    assert texts["cost"] == {"seconds": "9 min 12 s", "cpu_seconds": "18 min 24 s"}


def test_texts_of_values():
    assert value_text(0.8125, METRIC["agreement"]) == "81.2\u00a0%"
    assert value_text(-0.0123, METRIC["agreement"], signed=True) == "−1.23\u00a0points"
    assert value_text(2.345678, METRIC["frechet"], signed=True) == "+2.35"
    assert value_text(36.66, METRIC["frechet"]) == "36.7"
    assert value_text(None, METRIC["frechet"]) == "–"
    assert estimate({"mean": 36.66, "low": 35, "high": 38.111, "count": 3}, METRIC["frechet"]) == "36.7 (35 to 38.1)"
    assert estimate({"mean": 36.66, "low": None, "high": None, "count": 1}, METRIC["frechet"]) == "36.7"
    assert estimate(None, METRIC["frechet"]) == "–"


@pytest.mark.parametrize(
    ("metric", "low", "high", "verdict"),
    [
        ("frechet", -2.0, -1.0, "better"),
        ("frechet", 1.0, 2.0, "worse"),
        ("agreement", 0.1, 0.2, "better"),
        ("agreement", -0.2, -0.1, "worse"),
        ("agreement", -0.2, 0.1, "no difference shown"),
        ("agreement", 0.0, 0.1, "no difference shown"),
        ("agreement", None, None, "one seed: no interval"),
    ],
)
def test_verdicts(metric, low, high, verdict):
    entry = {"arm": "a", "control": "b", "metric": metric, "primary": False, "mean": 0.1, "low": low, "high": high}
    entry |= {"joint_low": None, "joint_high": None, "better": 1, "worse": 2, "count": 3}
    text = difference(entry, {"a": "A", "b": "B"})
    assert text["verdict"] == verdict
    assert text["joint"] == "–"


def test_a_primary_comparison_is_read_by_the_wider_interval():
    entry = {"arm": "a", "control": "b", "metric": "agreement", "primary": True, "mean": 0.02, "low": 0.001}
    entry |= {"high": 0.03, "joint_low": -0.006, "joint_high": 0.037, "better": 3, "worse": 0, "count": 3}
    assert difference(entry, {"a": "A", "b": "B"})["verdict"] == "no difference shown"
    assert difference(entry | {"joint_low": 0.001}, {"a": "A", "b": "B"})["verdict"] == "better"
    assert difference(entry | {"primary": False}, {"a": "A", "b": "B"})["verdict"] == "better"


def test_forest_plot():
    rows = [ForestRow("first", 1.0, 0.5, 1.5, True), ForestRow("second & last", -1.0, None, None)]
    svg = forest_plot(rows, axis="difference", name="Differences", salt="x")
    assert svg == forest_plot(rows, axis="difference", name="Differences", salt="x")
    assert svg.startswith('<svg role="img" aria-label="Differences"')
    assert "second &amp; last" in svg
    assert svg.index("first") != -1
    assert "var(--accent)" in svg
    assert "var(--accent)" not in forest_plot(rows[1:], axis="difference", name="Differences", salt="x")
    with pytest.raises(ValueError, match="rows is"):
        forest_plot([], axis="", name="", salt="")
