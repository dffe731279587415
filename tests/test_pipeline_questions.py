"""A question per image, and a transform of the originals, in ``Pipeline.detect``."""

import numpy as np
import pytest
from PIL import Image
from tiny_models import tiny_model

from unigendet.config import DataConfig, ImageConfig
from unigendet.data.tokenizer import train_tokenizer
from unigendet.inference.calibration import Calibration
from unigendet.inference.detect import detect_packed
from unigendet.inference.pipeline import Pipeline
from unigendet.model.autoencoder import PixelAutoencoder

VIEW = ImageConfig(min_size=8, max_size=8, stride=2)


@pytest.fixture(scope="module")
def pipeline():
    model, tokenizer = tiny_model(vocab_size=280), train_tokenizer(["This is a real image."], 270)
    return Pipeline(model, tokenizer, PixelAutoencoder(model.config.latent), DataConfig(VIEW, VIEW, question="Own?"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = [folder / f"{i}.png" for i in range(5)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (11, 9, 3), dtype=np.uint8)).save(path)
    return paths


def test_each_image_is_asked_its_own_question(pipeline, pictures):
    questions = ["Real?", None, "Is it, and why?", "Real?", ""]
    together = list(pipeline.detect(pictures, question=questions, max_new_tokens=3, batch_size=2))
    for picture, question, one in zip(pictures, questions, together, strict=True):
        (alone,) = pipeline.detect([picture], question=question, max_new_tokens=3)
        assert (one.name, one.explanation) == (alone.name, alone.explanation)
        assert one.probability == pytest.approx(alone.probability, abs=1e-6)
    (own,) = pipeline.detect(pictures[1:2], question="Own?", max_new_tokens=0)
    assert own.probability == pytest.approx(together[1].probability, abs=1e-6)
    assert own.probability != pytest.approx(together[0].probability, abs=1e-4)


def test_as_many_questions_as_images(pipeline, pictures):
    assert list(pipeline.detect([], question=[])) == []
    for questions in (["Real?"] * 4, ["Real?"] * 6, []):
        with pytest.raises(ValueError, match=f"question has {len(questions)} entries; it must be one text, or as many"):
            list(pipeline.detect(pictures, question=questions, max_new_tokens=0))


def test_the_longest_question_must_leave_room(pipeline, pictures):
    with pytest.raises(ValueError, match="max_new_tokens"):
        pipeline.detect(pictures[:2], question=["a", "a b c d e f g h i j k"], max_new_tokens=121)


def test_the_default_answer_fills_the_room_of_the_longest_question(pipeline, pictures, monkeypatch):
    # Of 128 positions, two images take one each, the question's delimiters two, and its tokens one each.
    room = {"a": 123, "Own?": 120, "xyz" * 7: 103}
    for question, most in room.items():
        assert pipeline.default_answer([question]) == most
        assert pipeline.default_answer([question], with_latent=False) == most + 1
    assert pipeline.default_answer(["a", None]) == room["Own?"]
    assert pipeline.default_answer(room) == 103
    asked = []

    def recorded(model, requests, *, max_new_tokens, **options):
        asked.append(max_new_tokens)
        return detect_packed(model, requests, max_new_tokens=1, **options)

    monkeypatch.setattr("unigendet.inference.pipeline.detect_packed", recorded)
    list(pipeline.detect(pictures[:3], question=list(room)))
    assert asked == [103]
    with pytest.raises(ValueError, match=r"question \(--question\) has 124 tokens; it must have at most 123"):
        pipeline.default_answer(["a", "b" * 124])


def test_every_question_must_be_the_calibration_s(pipeline, pictures):
    fitted = Calibration(question="Real?")
    assert len(list(pipeline.detect(pictures[:2], question=["Real?"] * 2, calibration=fitted, max_new_tokens=0))) == 2
    with pytest.raises(ValueError, match="fitted with the question"):
        pipeline.detect(pictures[:2], question=["Real?", "Fake?"], calibration=fitted)


def test_a_transform_is_applied_to_the_originals(pipeline, pictures):
    def mirrored(image):
        assert image.size == (9, 11)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)

    found = list(pipeline.detect(pictures, transform=mirrored, max_new_tokens=0))
    opened = [mirrored(Image.open(path)) for path in pictures]
    expected = list(pipeline.detect(opened, max_new_tokens=0))
    assert [one.name for one in found] == [str(path) for path in pictures]
    assert [one.probability for one in found] == [pytest.approx(one.probability, abs=1e-6) for one in expected]
    plain = list(pipeline.detect(pictures, max_new_tokens=0))
    assert all(a.probability != pytest.approx(b.probability, abs=1e-6) for a, b in zip(found, plain, strict=True))


def test_a_transform_that_fails_is_that_image_s_error(pipeline, pictures):
    def refuse(image):
        raise ValueError("too odd")

    rows = list(pipeline.detect(pictures[:2], transform=refuse, on_error="row"))
    assert [row.error for row in rows] == [f"image {path}: too odd" for path in pictures[:2]]
    with pytest.raises(ValueError, match=rf"image {pictures[0]}: too odd"):
        list(pipeline.detect(pictures[:2], transform=refuse))


def test_an_image_that_does_not_fit_into_memory(pipeline, pictures):
    def too_large(image):
        raise MemoryError

    message = "not enough memory; scale it down first"
    (row,) = pipeline.detect(pictures[:1], transform=too_large, on_error="row")
    assert row.error == f"image {pictures[0]}: {message}"
    with pytest.raises(ValueError, match=rf"image {pictures[0]}: {message}"):
        list(pipeline.detect(pictures[:1], transform=too_large))
    (row,) = pipeline.detect([Image.new("L", (9, 11))], transform=too_large, on_error="row")
    assert (row.name, row.error) == ("", f"the image: {message}")


def test_has_head(pipeline):
    assert pipeline.has_head
    model = tiny_model(vocab_size=280, class_head=False)
    assert not Pipeline(model, pipeline.tokenizer, pipeline.autoencoder, pipeline.data).has_head
