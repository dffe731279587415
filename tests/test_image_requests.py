"""From prompts and input images to the sampler: order of the conditions, sizes, errors beforehand, bounded memory."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import tiny_model

from unigendet.config import DataConfig, GuidanceConfig, ImageConfig
from unigendet.data.tokenizer import train_tokenizer
from unigendet.inference import pipeline as pipeline_module
from unigendet.inference.generate import GenerationRequest, generate_latents
from unigendet.inference.pipeline import Pipeline
from unigendet.inference.requests import ImageRequest
from unigendet.model.autoencoder import PixelAutoencoder
from unigendet.model.unigendet import UniGenDet
from unigendet.packing import LatentImage, Text, VitImage

GUIDANCE = GuidanceConfig(num_timesteps=4, text_scale=3.0, image_scale=2.0, interval=(0.0, 1.0))
LATENT_VIEW = ImageConfig(min_size=4, max_size=8, stride=2)
VIEWS = DataConfig(latent_view=LATENT_VIEW, vit_view=ImageConfig(min_size=4, max_size=6, stride=2))


class Recorder(PixelAutoencoder):
    """Counts encoded images."""

    calls = 0

    def encode(self, pixels, *, sample=False):
        assert not sample
        self.calls += 1
        return super().encode(pixels)


def make_pipeline():
    model = tiny_model(vocab_size=280)
    return Pipeline(model, train_tokenizer(["a", "b"], 270), Recorder(model.config.latent), VIEWS, GUIDANCE)


@pytest.fixture(scope="module")
def pipeline():
    return make_pipeline()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A wide one and a tall one, neither of a size that a view has."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = [folder / "wide.png", folder / "tall.png"]
    for path, (height, width) in zip(paths, ((13, 29), (31, 17)), strict=True):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return paths


def captured(monkeypatch):
    """The sampler's requests, and how often it was called."""
    calls = []
    inner = pipeline_module.generate_latents

    def recorded(model, requests, guidance, **options):
        calls.append(list(requests))
        return inner(model, requests, guidance, **options)

    monkeypatch.setattr(pipeline_module, "generate_latents", recorded)
    return calls


def view(path, width, height):
    """The tiny model's grey view of a picture, resized once, from the original."""
    grey = Image.open(path).convert("L").resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(grey, np.float32) / 127.5 - 1)[None]


def test_input_images_stand_in_both_views_before_the_text(pipeline, pictures, monkeypatch):
    calls = captured(monkeypatch)
    (image,) = pipeline.generate(["ab"], images=pictures, size=(4, 6))
    assert image.size == (6, 4)
    ((request,),) = calls
    assert [type(s) for s in request.conditions] == [LatentImage, VitImage, LatentImage, VitImage, Text]
    wide_latent, wide_vit, tall_latent, tall_vit, text = request.conditions
    torch.testing.assert_close(wide_latent.latent, view(pictures[0], 8, 4))
    torch.testing.assert_close(wide_vit.pixels, view(pictures[0], 6, 4))
    torch.testing.assert_close(tall_latent.latent, view(pictures[1], 4, 8))
    torch.testing.assert_close(tall_vit.pixels, view(pictures[1], 4, 6))
    assert list(text.ids) == pipeline.tokenizer.encode("ab")
    assert not wide_latent.noised


def test_an_image_from_images_is_the_samplers(pipeline, pictures):
    (image,) = pipeline.generate(["ab"], images=pictures[:1], seed=3)
    latent, pixels = pipeline.builder.views(pictures[0])
    request = GenerationRequest((LatentImage(latent), VitImage(pixels), pipeline.builder.text("ab")), (4, 8))
    noise = [torch.randn(8, 4, generator=torch.Generator().manual_seed(3))]
    (tokens,) = generate_latents(pipeline.model, [request], GUIDANCE, noise=noise)
    expected = tokens.reshape(2, 4, 2, 2).permute(0, 2, 1, 3).reshape(4, 8)
    expected = ((expected + 1) * 127.5).round().clamp(0, 255)
    assert np.array_equal(np.asarray(image), expected.numpy().astype(np.uint8))


def test_input_images_and_their_guidance_change_the_image(pipeline, pictures):
    def made(**options):
        return np.asarray(pipeline.generate(["ab"], size=(4, 4), **options)[0], int)

    plain, edited = made(), made(images=pictures[:1])
    weak = made(images=pictures[:1], guidance=dataclasses.replace(GUIDANCE, image_scale=1.0))
    for a, b in ((plain, edited), (edited, weak), (edited, made(images=pictures))):
        assert np.abs(a - b).max() > 2


@pytest.mark.parametrize("images", [0, 1, 2])
def test_a_step_is_one_pass_through_the_model(pipeline, pictures, images, monkeypatch):
    samples, forward = [], UniGenDet.forward

    def recorded(model, batch, **arguments):
        samples.append(batch.layout.num_samples)
        return forward(model, batch, **arguments)

    monkeypatch.setattr(UniGenDet, "forward", recorded)
    pipeline.generate(["a", "b", "ab"], images=pictures[:images], batch_size=2)
    branches = 3 if images else 2
    assert samples == [2 * branches] * 3 + [branches] * 3  # two batches of three steps


def test_size_without_one_is_the_last_input_images(pipeline, pictures):
    wide, tall = pictures
    requests = [
        ImageRequest("a"),
        ImageRequest("a", images=(wide,)),
        ImageRequest("a", images=(wide, tall)),
        ImageRequest("a", images=(wide, Image.new("L", (9, 9)))),
        ImageRequest("a", size=(2, 4), images=(wide,)),
    ]
    sizes = [(8, 8), (4, 8), (8, 4), (8, 8), (2, 4)]
    assert [r.size for r in pipeline.check_requests(requests)] == sizes
    assert [image.size for image in pipeline.generate_each(requests, batch_size=3)] == [(w, h) for h, w in sizes]


def test_images_do_not_depend_on_their_batch(pipeline, pictures):
    """Other sizes and numbers of conditions in one pack."""
    requests = [
        ImageRequest("a", 1),
        ImageRequest("bc", 2, (4, 4), (pictures[0],)),
        ImageRequest("", 3, (2, 8), tuple(pictures)),
    ]
    together = pipeline.generate_each(requests)
    alone = [next(pipeline.generate_each([request])) for request in requests]
    for a, b in zip(together, alone, strict=True):
        assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1


def test_a_shared_input_image_is_encoded_once(pictures):
    pipeline = make_pipeline()
    pipeline.generate(["a"] * 5, images=pictures[:1], size=(4, 4), batch_size=2)
    assert pipeline.autoencoder.calls == 1
    each = [ImageRequest("a", size=(4, 4), images=(p,)) for p in (*pictures, *pictures)]
    list(pipeline.generate_each(each, batch_size=2))
    assert pipeline.autoencoder.calls == 3


def test_no_batch_is_made_before_it_is_asked_for(pipeline, monkeypatch):
    calls = captured(monkeypatch)
    images = pipeline.generate_each([ImageRequest("a", i) for i in range(5)], batch_size=2)
    assert calls == []
    for i, batches in enumerate([1, 1, 2, 2, 3]):
        next(images)
        assert len(calls) == batches, i
    assert next(images, None) is None


def test_longest_prompt(pipeline):
    """128 positions: a text's tokens and two delimiters, two for an input image's views, one for the new image."""
    picture = Image.new("L", (8, 8))
    for count, images in ((125, ()), (123, (picture,)), (121, (picture, picture))):
        fits, longer = "x" * count, "x" * (count + 1)
        assert len(pipeline.tokenizer.encode(fits)) == count
        list(pipeline.generate_each([ImageRequest(fits, 0, (2, 2), images)]))
        beside = f" beside {len(images)} input images" if images else ""
        message = (
            f"p.txt, line 2 ('{'x' * 40}…') has {count + 1} tokens; it must have at most {count}{beside}: "
            "the model has 128 positions (max_position)"
        )
        with pytest.raises(ValueError, match="max_position") as error:
            pipeline.generate_each([ImageRequest("fine"), ImageRequest(longer, 0, (2, 2), images, "p.txt, line 2")])
        assert str(error.value) == message


def test_mistakes_are_found_before_the_first_image(pipeline, pictures, tmp_path, monkeypatch):
    calls = captured(monkeypatch)
    (tmp_path / "notes.png").write_text("no image")
    cases = [
        (
            ImageRequest("bad", size=(3, 4)),
            r"prompt 'bad': size is \(3, 4\); it must be .*multiples of 2 pixels and at",
        ),
        (ImageRequest("bad", size=(4, 10), name="p.json, entry 7"), r"p\.json, entry 7 \('bad'\): size is \(4, 10\)"),
        (ImageRequest("bad", images=(pictures[0], tmp_path / "notes.png")), r"notes\.png cannot be decoded"),
        (ImageRequest("bad", size=(4, 4), images=(tmp_path / "notes.png",)), r"notes\.png cannot be decoded"),
        (ImageRequest("bad", images=(tmp_path / "lost.png",)), r"lost\.png does not exist"),
    ]
    for request, message in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            pipeline.generate_each([ImageRequest("fine"), request])
    assert calls == []
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match=rf"seed is {seed}; it must be from 0"):
            ImageRequest("a", seed)


def test_a_turned_picture_has_the_size_that_people_see(pipeline, tmp_path):
    """Orientation 6 of EXIF: stored 24×12, shown 12×24."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (24, 12)).save(tmp_path / "turned.jpg", exif=exif)
    with Image.open(tmp_path / "turned.jpg") as opened:
        requests = [ImageRequest("a", images=(image,)) for image in (tmp_path / "turned.jpg", opened)]
        assert [request.size for request in pipeline.check_requests(requests)] == [(8, 4), (8, 4)]
