"""What disturbances do to pixels, and the curves of verdicts under them."""

import io
import math

import numpy as np
import pytest
from PIL import Image

from unigendet.evaluation.detection import DetectionOutcome, evaluate_detection
from unigendet.evaluation.robustness import KINDS, Disturbance, robustness_curves

RNG = np.random.default_rng(0)
PHOTO = Image.fromarray(RNG.integers(0, 256, (20, 31, 3), dtype=np.uint8))
DIGIT = Image.fromarray(RNG.integers(0, 17, (8, 8), dtype=np.uint8) * 15)
EVERY = [Disturbance(name, level) for name, kind in KINDS.items() for level in kind.levels]


def values(image):
    return np.asarray(image, np.float64)


@pytest.mark.parametrize("disturbance", EVERY, ids=lambda d: d.name)
@pytest.mark.parametrize("image", [PHOTO, DIGIT, Image.new("L", (1, 1), 77)], ids=["photo", "digit", "pixel"])
def test_always_the_same_and_never_the_image_itself(disturbance, image):
    before = values(image)
    once, again = disturbance(image), disturbance(image)
    assert np.array_equal(values(once), values(again))
    assert np.array_equal(values(image), before)
    assert once.mode == "RGB"
    assert min(once.size) >= 1


def test_jpeg_is_the_file_that_pillow_writes():
    buffer = io.BytesIO()
    PHOTO.save(buffer, format="JPEG", quality=50)
    assert np.array_equal(values(Disturbance("jpeg", 50)(PHOTO)), values(Image.open(buffer)))


def test_lower_quality_is_further_from_the_image():
    smooth = Image.fromarray(np.linspace(0, 255, 64 * 64).reshape(64, 64).astype(np.uint8))
    errors = [
        np.abs(values(Disturbance("jpeg", q)(smooth)) - values(smooth.convert("RGB"))).mean() for q in (95, 75, 30, 5)
    ]
    assert errors == sorted(errors)
    assert 0 < errors[0] < errors[-1]


def test_resize():
    assert Disturbance("resize", 0.5)(PHOTO).size == (16, 10)  # of 31 × 20; half to even
    assert Disturbance("resize", 0.25)(DIGIT).size == (2, 2)
    assert Disturbance("resize", 0.01)(PHOTO).size == (1, 1)
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (16, 8)))
    middle = values(Disturbance("resize", 0.25)(stripes))[1:-1, 1:-1]
    assert np.abs(middle - 127.5).max() < 3  # antialiased: neither black nor white is left


def test_blur_is_a_gaussian():
    """A white pixel spreads to the outer product of a normalised Gaussian; each colour by itself."""
    dot = np.zeros((31, 31, 3), np.uint8)
    dot[15, 15] = (255, 0, 128)
    x = np.arange(-15, 16)
    weights = np.where(np.abs(x) <= 8, np.exp(-(x**2) / (2 * 2**2)), 0)
    kernel = np.outer(weights, weights) / weights.sum() ** 2
    expected = kernel[..., None] * np.array([255, 0, 128])
    found = values(Disturbance("blur", 2)(Image.fromarray(dot)))
    assert np.abs(found - expected).max() <= 0.5 + 1e-4  # of rounding to 8 bits
    flat = Image.new("RGB", (5, 4), (10, 200, 30))
    assert np.array_equal(values(Disturbance("blur", 4)(flat)), values(flat))  # mirrored edges let no black in


def test_stronger_blur_leaves_less_contrast():
    spreads = [values(Disturbance("blur", sigma)(PHOTO)).std() for sigma in (0.5, 1, 2, 4)]
    assert spreads == sorted(spreads, reverse=True)
    assert spreads[-1] < spreads[0] / 2 < values(PHOTO).std() / 2


def test_transparency_is_on_white_as_for_the_undisturbed_image():
    clear = Image.new("RGBA", (9, 9), (0, 0, 0, 0))
    for disturbance in EVERY:
        found = disturbance(clear)
        assert found.mode == "RGB"
        assert values(found).min() >= 254
    palette = Image.new("P", (9, 9))
    assert Disturbance("blur", 1)(palette).mode == "RGB"


@pytest.mark.parametrize(
    ("kind", "level", "message"),
    [
        ("crop", 1, "kind is 'crop'; it must be one of jpeg, resize, blur"),
        ("jpeg", 0, "level of jpeg is 0; it must be a whole number from 1 to 100"),
        ("jpeg", 101, "level of jpeg"),
        ("jpeg", 50.5, "level of jpeg"),
        ("resize", 1, "level of resize is 1; it must be between 0 and 1"),
        ("resize", 0, "level of resize"),
        ("blur", 0, "level of blur is 0; it must be positive"),
        ("blur", math.inf, "level of blur is inf"),
        ("jpeg", math.nan, "level of jpeg is nan"),
    ],
)
def test_unfit_levels_are_named(kind, level, message):
    with pytest.raises(ValueError, match=message):
        Disturbance(kind, level)


def test_the_usual_levels_go_from_mild_to_strong():
    for name, kind in KINDS.items():
        changes = [np.abs(np.asarray(Disturbance(name, level)(PHOTO).resize(PHOTO.size), float) - values(PHOTO)).mean()
                   for level in kind.levels]  # fmt: skip
        assert changes == sorted(changes), name
        assert changes[0] < changes[-1]


def test_curves():
    def summary(real, fake):
        return evaluate_detection([DetectionOutcome("r", "real", 1, real, 0.9 if real else 0.2),
                                   DetectionOutcome("f", "gan", 0, fake, 0.6 if fake else 0.3)])  # fmt: skip

    disturbed = {Disturbance("blur", 2): summary(0, 1), Disturbance("jpeg", 30): summary(1, 1),
                 Disturbance("jpeg", 90): summary(1, 0), Disturbance("blur", 0.5): summary(0, 0)}  # fmt: skip
    curves = robustness_curves(summary(1, 0), disturbed)
    assert {kind: [p.level for p in points] for kind, points in curves.items()} == {
        "blur": [None, 0.5, 2], "jpeg": [None, 90, 30],
    }  # fmt: skip
    assert [p.accuracy for p in curves["blur"]] == [1.0, 0.5, 0.0]
    assert [p.balanced_accuracy for p in curves["jpeg"]] == [1.0, 1.0, 0.5]
    assert [p.roc_auc for p in curves["blur"]] == [1.0, 0.0, 0.0]
    assert curves["jpeg"][2].groups == {"real": 1.0, "gan": 0.0}
    assert curves["jpeg"][0].accuracy_interval == summary(1, 0).overall.accuracy_interval
