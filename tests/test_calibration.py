"""Calibration: what it does to logits, how it is fitted, saved and loaded, and ``unigendet calibrate``."""

import json
import math

import numpy as np
import pytest
from command_runs import fails, noise_picture, run_command, tiny_pipeline
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, log_loss

from unigendet.evaluation.calibration import (
    TEMPERATURES,
    at_limit,
    best_threshold,
    fit_calibration,
    fit_temperature,
    measure,
    unsure_band,
)
from unigendet.inference.calibration import Calibration


def drawn(count=4000, temperature=2.5, seed=0):
    """Logits whose probabilities are right at ``temperature``, and labels drawn with these."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 4, count)
    return logits, (rng.random(count) < 1 / (1 + np.exp(-logits / temperature))).astype(int)


def test_probabilities_and_verdicts():
    calibration = Calibration(temperature=2, threshold=0.6, unsure=(0.4, 0.7))
    assert calibration.probability(0.0) == 0.5
    assert calibration.probability(2 * math.log(3)) == pytest.approx(0.75)
    assert calibration.probability(-2 * math.log(3)) == pytest.approx(0.25)
    assert (calibration.probability(1e6), calibration.probability(-1e6)) == (1.0, 0.0)
    cases = {0.39: False, 0.4: False, 0.41: None, 0.6: None, 0.69: None, 0.7: True, 0.9: True}
    assert {p: calibration.verdict(p) for p in cases} == cases
    assert [Calibration().verdict(p) for p in (0.49, 0.5)] == [False, True]


def test_the_temperature_is_the_one_the_labels_were_drawn_with():
    logits, labels = drawn()
    temperature = fit_temperature(logits, labels.astype(bool))
    assert temperature == pytest.approx(2.5, rel=0.06)
    # The same by logistic regression, every image once as real and once as fake, weighted by its smoothed label.
    smoothed = np.where(labels == 1, (labels.sum() + 1) / (labels.sum() + 2), 1 / ((1 - labels).sum() + 2))
    model = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10)
    model.fit(np.tile(logits, 2)[:, None], np.repeat([1, 0], len(logits)), np.concatenate([smoothed, 1 - smoothed]))
    assert temperature == pytest.approx(1 / model.coef_[0, 0], rel=1e-4)
    fitted = fit_calibration(logits, labels)
    before, after = fitted.measured["before"], fitted.measured["after"]
    assert after["nll"] == pytest.approx(log_loss(labels, [fitted.probability(x) for x in logits]))
    assert before["nll"] > after["nll"]
    assert before["ece"] > 0.05 > 0.02 > after["ece"]


def test_a_temperature_that_labels_do_not_determine():
    logits = np.linspace(-3, 3, 40)
    reverse = logits < 0
    assert at_limit(fit_temperature(logits, reverse))
    assert not at_limit(2.5)
    fitted = fit_calibration(logits, reverse.astype(int))
    assert (fitted.temperature, fitted.measured["temperature_found"]) == (1.0, False)
    assert fit_calibration(logits, (logits > 0).astype(int)).measured["temperature_found"]


def drawn_apart(rng, count, scale):
    """``count`` of each label; sigmoid(logit / scale) is the probability of real, so a ``scale`` of 1 is calibrated."""
    logits = np.concatenate([rng.normal(2, 2, count), rng.normal(-2, 2, count)]) * scale
    return logits, np.repeat([1, 0], count)


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.5])
def test_few_images_that_are_told_apart_perfectly(scale):
    """Of a detector that errs in a sixth of all images: what they show is luck, not certainty."""
    rng, fits = np.random.default_rng(0), 0
    fresh, truth = drawn_apart(rng, 5000, scale)
    for _ in range(2000):
        logits, labels = drawn_apart(rng, 12, scale)
        if not np.array_equal(logits > 0, labels == 1):
            continue
        fitted, fits = fit_calibration(logits, labels), fits + 1
        assert fitted.measured["temperature_found"]
        before, after, certain = (
            measure(one, fresh, truth == 1)["ece"] for one in (Calibration(), fitted, Calibration(TEMPERATURES[0]))
        )
        assert after < certain / 2
        assert after <= before or scale == 1
    assert fits >= 5


def judged(p, real, threshold):
    called = p >= threshold
    return balanced_accuracy_score(real, called), (~called)[real].mean(), (~called)[~real].mean()


@given(
    values=st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=2, max_size=30).filter(
        lambda pairs: len({label for _, label in pairs}) == 2
    ),
    limit=st.sampled_from([None, 0.0, 0.1, 0.34, 0.5, 0.99]),
)
def test_no_threshold_is_better(values, limit):
    """Against all thresholds on a fine grid; probabilities 0 and 1 occur, and ties."""
    p = np.array([value / 12 for value, _ in values])
    real = np.array([label for _, label in values])
    accuracy, alarms, caught = judged(p, real, best_threshold(p, real, limit))
    for threshold in np.linspace(0, 1, 97):
        other, other_alarms, other_caught = judged(p, real, threshold)
        if limit is None:
            assert accuracy >= other - 1e-9
        else:
            assert alarms <= limit
            better = (other_caught, -other_alarms) > (caught, -alarms)
            assert not better or other_alarms > limit


def test_the_threshold_is_the_middle_of_the_widest_best_interval():
    real = np.array([False, False, True, False, True, True])
    p = np.array([0.1, 0.2, 0.3, 0.35, 0.6, 0.9])
    # Above 0.2 and above 0.35 five of six are right in the balanced sense; 0.35 to 0.6 is wider.
    assert best_threshold(p, real) == pytest.approx(0.475)
    assert best_threshold(p, real, 0.0) == pytest.approx(0.25)
    assert best_threshold(p, real, 0.34) == pytest.approx(0.475)


def test_the_band_is_the_narrowest_that_is_enough():
    logits, labels = drawn(500, seed=3)
    for accuracy in (0.7, 0.85, 0.9):
        fitted = fit_calibration(logits, labels, confident_accuracy=accuracy)
        after = fitted.measured["after"]
        if fitted.unsure is None:
            assert after["accuracy"] >= accuracy
            continue
        assert after["accuracy"] < accuracy <= after["confident_accuracy"]
        low, high = fitted.unsure
        p = np.array([fitted.probability(x) for x in logits])
        verdicts = [fitted.verdict(x) for x in p]
        assert after["unsure"] == verdicts.count(None) / 500

        def logit(x):
            return math.log(x / (1 - x))

        middle = logit(fitted.threshold)
        assert middle - logit(low) == pytest.approx(logit(high) - middle)
        right = (p >= fitted.threshold) == labels.astype(bool)
        distance = np.abs(np.array([logit(x) for x in p]) - middle)
        for narrower in sorted(d for d in distance if d < logit(high) - middle):
            assert right[distance >= narrower].mean() < accuracy
    assert fit_calibration(logits, labels, confident_accuracy=0.51).unsure is None


def test_no_band_is_enough():
    p, real = np.array([0.2, 0.4, 0.6, 0.99]), np.array([False, False, True, False])
    with pytest.raises(
        ValueError, match=r"confident_accuracy is 0\.9; outside the best band of these images it is 0\.75"
    ):
        unsure_band(p, real, 0.5, 0.9)
    assert unsure_band(p, real, 0.5, 0.75) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": [1] * 40}, "the number of fake images is 0; it must be at least 10 for a calibration, and several"),
        ({"labels": [0] * 35 + [1] * 5}, "the number of real images is 5"),
        ({"labels": [0, 2] * 20}, r"labels is \[2\]; it must be 1"),
        ({"logits": [0.0] * 39}, r"logits is 'of shape \[39\]'; it must be one per label, \[40\]"),
        ({"logits": [math.nan] * 40}, "logits is 'not finite in places'"),
        ({"max_false_alarms": 1.0}, r"max_false_alarms is 1\.0; it must be a share in \[0, 1\)"),
        ({"confident_accuracy": 0.5}, r"confident_accuracy is 0\.5; it must be a share in \(0\.5, 1\]"),
    ],
)
def test_requests_that_cannot_be_met(changes, message):
    arguments = {"logits": np.linspace(-1, 1, 40), "labels": [0, 1] * 20} | changes
    with pytest.raises(ValueError, match=message):
        fit_calibration(**arguments)


def test_round_trip(tmp_path):
    calibration = Calibration(1.5, 0.4, (0.2, 0.6), "abc", "Real?", True, {"before": {"nll": 0.5}})
    calibration.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == calibration
    Calibration().save(tmp_path / "c.json")
    assert Calibration.load(str(tmp_path / "c.json")) == Calibration()
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "other"}, r"has the schema 'other'; it must be 'unigendet-calibration/2'"),
        ({"extra": 1}, "lacks or has beyond its entries: extra"),
        ({"threshold": "high"}, r"threshold is 'high'; it must be a probability"),
        ({"threshold": True}, "threshold is True"),
        ({"temperature": 0}, "temperature is 0; it must be a positive number"),
        ({"unsure": [0.6, 0.7]}, r"threshold is 0\.5; it must be within the unsure band"),
        ({"unsure": [0.1]}, "unsure is"),
        ({"unsure": 3}, "int"),
        ({"question": 3}, "question is 3; it must be a str or None"),
        ({"measured": []}, "measured is"),
    ],
)
def test_damaged_files_are_named(tmp_path, change, message):
    file = tmp_path / "c.json"
    Calibration().save(file)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=rf"c\.json.*{message}"):
        Calibration.load(file)


def test_files_that_are_none(tmp_path):
    file = tmp_path / "c.json"
    with pytest.raises(FileNotFoundError, match=r"c\.json does not exist; 'unigendet calibrate' makes one"):
        Calibration.load(file)
    for content, message in ((b"{", "is not JSON"), (b"\xff", "is not JSON"), (b"[]", "has the schema None")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"c\.json {message}"):
            Calibration.load(file)


@pytest.fixture
def labelled(tmp_path):
    """Twelve of each label, real ones lighter but for one, fakes darker but for one; and a file that is no picture."""
    levels = {"real": [0, *range(132, 253, 12)], "fake/gan": [132, *range(0, 121, 12)]}
    for name, greys in levels.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        for i, grey in enumerate(greys):
            Image.new("L", (9, 8), grey).save(tmp_path / "data" / name / f"{i}.png")
    (tmp_path / "data" / "real" / "broken.png").write_text("no picture")
    return tmp_path / "data"


def test_calibrate_then_detect(capsys, model_folder, labelled, tmp_path):
    file = tmp_path / "new" / "c.json"
    base = ["--model", model_folder, "--question", "Real?", "--no-latent"]
    result = run_command(capsys, "calibrate", *base, labelled, "--out", file, "--confident-accuracy", 0.95)
    assert result.code == 0, result.err
    left_out = f"unigendet calibrate: left out: image {labelled / 'real' / 'broken.png'} cannot be decoded"
    assert result.err.splitlines()[0].startswith(left_out)
    assert len(result.err.splitlines()) == 1
    assert result.lines[0] == f"12 real and 12 fake images of {labelled}"
    assert result.lines[-1] == f"The calibration: {file}"
    calibration = Calibration.load(file)
    measured = calibration.measured
    assert (measured["real"], measured["fake"], measured["left_out"]) == (12, 12, 1)
    assert (calibration.question, calibration.with_latent) == ("Real?", False)
    shown = {line[:28].strip(): line[28:].split() for line in result.lines if line[28:].strip()}
    assert shown["temperature"] == ["1.0000", f"{calibration.temperature:.4f}"]
    assert shown["balanced accuracy"] == [f"{measured[when]['balanced_accuracy']:.4f}" for when in ("before", "after")]
    rows = run_command(capsys, "detect", *base, labelled, "--calibration", file, "--max-tokens", 0, "--format", "jsonl")
    entries = [json.loads(line) for line in rows.lines]
    judged = [entry for entry in entries if entry["verdict"] != "error"]
    assert len(judged) == 24
    assert measured["after"]["accuracy"] == 22 / 24
    unsure = sum(entry["verdict"] == "unsure" for entry in judged)
    assert 0 < unsure / 24 == measured["after"]["unsure"]
    right = sum((entry["probability_real"] >= calibration.threshold) == ("real" in entry["path"]) for entry in judged)
    assert right / 24 == measured["after"]["accuracy"]
    assert run_command(capsys, "calibrate", *base, labelled, "--out", file, "--overwrite").code == 0
    assert Calibration.load(file).unsure is None
    other = run_command(capsys, "detect", "--model", model_folder, labelled, "--calibration", file)
    assert other.code == 1
    assert "was fitted with the question 'Real?'" in other.err


def test_images_that_determine_no_temperature(capsys, model_folder, tmp_path):
    """All alike, half of them fake: the best probability is one half for all, which no temperature gives."""
    for i in range(20):
        path = tmp_path / "data" / ("real", "fake")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_picture(0).save(path)
    result = run_command(capsys, "calibrate", "--model", model_folder, tmp_path / "data", "--out", tmp_path / "c.json")
    assert result.code == 0
    assert "these images determine no temperature (the logits do not tell them apart); it stays 1" in result.err
    calibration = Calibration.load(tmp_path / "c.json")
    assert (calibration.temperature, calibration.measured["temperature_found"]) == (1.0, False)


def test_the_head_is_missed_before_the_model_loads(capsys, labelled, tmp_path, monkeypatch):
    tiny_pipeline(class_head=False).save(tmp_path / "headless")
    monkeypatch.setattr("unigendet.commands.calibrate.load_pipeline", lambda options: pytest.fail("loaded"))
    result = run_command(capsys, "calibrate", "--model", tmp_path / "headless", labelled, "--out", tmp_path / "c.json")
    fails(result, "headless has no real/fake head; there is nothing to calibrate")


def test_mistakes(capsys, model_folder, labelled, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    one = tmp_path / "one" / "real"
    one.mkdir(parents=True)
    for i in range(12):
        noise_picture(i).save(one / f"{i}.png")
    cases = [
        ([tmp_path / "lost"], "lost does not exist; it must be an annotation file or a folder"),
        ([tmp_path / "one"], "the number of fake images is 0; it must be at least 10"),
        ([tmp_path], "it must hold images in real/, fake/ or both"),
        ([labelled, "--out", tmp_path], "is a folder; name a file"),
        ([labelled, "--out", tmp_path / "notes.txt"], "holds something already; choose another name, or"),
        ([labelled, "--out", tmp_path / "notes.txt" / "c.json"], "c.json cannot be written: "),
        ([labelled, "--max-false-alarms", 2], "max_false_alarms is 2.0; it must be a share"),
        ([labelled, "--confident-accuracy", 0.2], "confident_accuracy is 0.2; it must be a share"),
        ([labelled, "--question", "?" * 200], "question (--question) has 200 tokens; it must have at most"),
    ]
    for arguments, message in cases:
        result = run_command(capsys, "calibrate", "--model", model_folder, "--out", tmp_path / "c.json", *arguments)
        assert (result.code, result.out) == (1, "")
        assert message in result.err
        assert len(result.err.splitlines()) == 1
    assert not (tmp_path / "c.json").exists()
