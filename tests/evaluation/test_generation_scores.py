"""Scores of folders of pictures: real digits score as real digits do, and doubtful numbers come with a note."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from unigendet.data.quickstart import CAPTIONS, caption, load_digits, write_png
from unigendet.evaluation.generation_scores import (
    GenerationScores,
    digits_of,
    format_scores,
    is_scores,
    score_digits,
    score_inception,
    write_scores,
)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The real test digits as pictures, with their prompts."""
    folder, digits = tmp_path_factory.mktemp("real"), load_digits()
    paths = [folder / f"{i:05}.png" for i in range(len(digits.test_labels))]
    for path, image in zip(paths, digits.test_images, strict=True):
        write_png(path, image)
    return paths, [caption(int(digit), i % len(CAPTIONS)) for i, digit in enumerate(digits.test_labels)]


def test_digits_of_prompts():
    every = [caption(digit, phrasing) for digit in range(10) for phrasing in range(len(CAPTIONS))]
    assert digits_of(every) == [digit for digit in range(10) for _ in CAPTIONS]
    assert digits_of(["the  digit\nseven", "The digit seven", "a cat", None, ""]) == [7, None, None, None, None]


def test_real_digits(real):
    scores = score_digits(*real)
    assert scores.frechet == pytest.approx(0, abs=1e-9)
    assert scores.agreement.accuracy == scores.real.svm_accuracy > 0.98
    assert (scores.images, scores.reference, scores.dimensions, scores.warnings) == (397, 397, 20, ())
    text = format_scores(scores)
    assert "generated images  397\n" in text
    assert f"prompt agreement  {scores.agreement.accuracy:.1%}  (95 % interval" in text


def test_doubtful_numbers_come_with_a_note(real):
    paths, prompts = real
    some = score_digits(paths[:15], prompts[:15])
    few, classes = some.warnings
    assert few.startswith(
        "the smaller set has 15 images for 20 features: fewer than features, so the covariance is sing"
    )
    assert classes.startswith("the digits do not come as often as in the reference")
    assert some.frechet > 1
    (more,) = score_digits(paths[:199], [*prompts[:198], "a cat"]).warnings[:1]
    assert more.startswith("the smaller set has 199 images for 20 features; the Fréchet distance is biased upwards")
    for odd, what in (("a cat", "has the prompt 'a cat', which is no digit's"), (None, "has no known prompt")):
        scores = score_digits(paths, [*prompts[:5], odd, *prompts[6:]])
        assert scores.warnings == (f"no agreement with the prompts: {paths[5]} {what}",)
        assert scores.agreement is None
        assert scores.frechet == pytest.approx(0, abs=1e-9)


def test_pictures_that_are_no_digits(real, tmp_path):
    paths, prompts = real
    Image.new("L", (8, 9)).save(tmp_path / "tall.png")
    (tmp_path / "cut.png").write_bytes(paths[0].read_bytes()[:60])
    for name, message in (("tall.png", r"tall\.png has 8×9 pixels; a digit must have 8×8"), ("cut.png", r"cut\.png")):
        with pytest.raises(ValueError, match=message):
            score_digits([paths[0], tmp_path / name], prompts[:2])
    with pytest.raises(ValueError, match="images is '1 files'; it must be two or more"):
        score_digits(paths[:1], prompts[:1])


class Features:
    """Stands for Inception: four features, a picture's mean in each, moved by a number for the feature."""

    published = True

    def __call__(self, images, *, batch_size, done):
        for _ in images:
            done()
        means = np.array([[np.asarray(Image.open(path)).mean()] for path in images])
        return means + np.arange(4)


def test_published_inception_weights_give_no_note_but_that_of_few_images(real, monkeypatch):
    monkeypatch.setattr("unigendet.evaluation.generation_scores.FEATURES", 4)
    counted = []
    scores = score_inception(real[0][:4], real[0][2:8], Features(), done=lambda: counted.append(1))
    assert (scores.images, scores.reference, scores.dimensions, len(counted)) == (4, 6, 4, 10)
    assert [note[:27] for note in scores.warnings] == ["the smaller set has 4 image"]
    assert scores.frechet > 0
    assert score_inception(real[0][:40], real[0][:40], Features(), done=lambda: None).warnings == ()


def test_file(tmp_path):
    scores = GenerationScores("inception", 3, 4, 2048, 12.5, warnings=("a note",))
    path = write_scores(tmp_path, scores, {"model": "m", "size": (8, 8)})
    first = path.read_bytes()
    data = json.loads(first)
    assert data["schema"] == 1
    assert data["settings"] == {"model": "m", "size": [8, 8]}
    assert data["counts"] == {"images": 3, "reference": 4, "dimensions": 2048}
    assert (data["frechet_distance"], data["agreement"], data["warnings"]) == (12.5, None, ["a note"])
    assert {"versions", "platform", "cpus", "commit"} == set(data["environment"])
    assert is_scores(path)
    write_scores(tmp_path, scores, {"model": "m", "size": (8, 8)})
    assert path.read_bytes() == first
    for content in (b"", b"[]", b'{"num_timesteps": 3}', b"\xff"):
        path.write_bytes(content)
        assert not is_scores(path)
    assert not is_scores(tmp_path / "lost")
    assert format_scores(dataclasses.replace(scores, frechet=1234.5)).splitlines()[2:] == [
        "Fréchet distance  1234  (inception, 2,048 features)"
    ]
