"""From files and prompts to verdicts and pictures, and the model folder in between."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import tiny_model

from unigendet.config import DataConfig, GuidanceConfig, ImageConfig, LatentConfig
from unigendet.data.tokenizer import train_tokenizer
from unigendet.inference import pipeline as pipeline_module
from unigendet.inference.detect import DetectionOutput
from unigendet.inference.pipeline import Pipeline, load_guidance
from unigendet.model.autoencoder import PixelAutoencoder
from unigendet.packing import LatentImage

GUIDANCE = GuidanceConfig(num_timesteps=3)
VIEWS = DataConfig(
    latent_view=ImageConfig(min_size=4, max_size=8, stride=2),
    vit_view=ImageConfig(min_size=4, max_size=6, stride=2),
    question="Real or not?",
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["This is a real image.", "This is a fake image.", "Real or not?"], 280)


def make_pipeline(tokenizer, autoencoder=None, **changes):
    model = tiny_model(vocab_size=280, **changes)
    return Pipeline(model, tokenizer, autoencoder or PixelAutoencoder(model.config.latent), VIEWS)


@pytest.fixture(scope="module")
def pipeline(tokenizer):
    return make_pipeline(tokenizer)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Five images, none of a size that a view has."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = [folder / f"{i}.png" for i in range(5)]
    for i, path in enumerate(paths):
        Image.fromarray(rng.integers(0, 256, (17 + i, 29 - 3 * i, 3), dtype=np.uint8)).save(path)
    return paths


def same(a, b):
    a, b = list(a), list(b)
    assert [(x.name, x.real, x.explanation) for x in a] == [(x.name, x.real, x.explanation) for x in b]
    assert [x.probability for x in a] == pytest.approx([x.probability for x in b], abs=1e-6)


def test_detections_come_in_order_whatever_the_batch(pipeline, pictures):
    one_by_one = list(pipeline.detect(pictures, max_new_tokens=5, batch_size=1))
    assert [d.name for d in one_by_one] == [str(p) for p in pictures]
    assert all((d.probability >= 0.5) == d.real for d in one_by_one)
    assert all(d.verdict == ("real" if d.real else "fake") for d in one_by_one)
    assert len({round(d.probability, 6) for d in one_by_one}) == 5
    for size in (2, 5, 99):
        same(pipeline.detect(pictures, max_new_tokens=5, batch_size=size), one_by_one)
    assert list(pipeline.detect([])) == []


def test_verdict_does_not_change_from_run_to_run(pipeline, pictures):
    assert list(pipeline.detect(pictures, max_new_tokens=5)) == list(pipeline.detect(pictures, max_new_tokens=5))


def test_opened_images_and_paths_are_the_same(pipeline, pictures):
    opened = [Image.open(path) for path in pictures]
    same(pipeline.detect(opened, max_new_tokens=3), pipeline.detect(pictures, max_new_tokens=3))
    (nameless,) = pipeline.detect([Image.new("L", (9, 9))], max_new_tokens=0)
    assert nameless.name == ""


def test_question_and_latent_view_matter(pipeline, pictures):
    (default,) = pipeline.detect(pictures[:1], max_new_tokens=0)
    (same_question,) = pipeline.detect(pictures[:1], max_new_tokens=0, question=VIEWS.question)
    assert same_question == default
    for change in ({"question": "Why?"}, {"with_latent": False}, {"question": ""}):
        (other,) = pipeline.detect(pictures[:1], max_new_tokens=0, **change)
        assert other.probability != pytest.approx(default.probability, abs=1e-5)


def test_sampled_answers_depend_on_the_seed(pipeline, pictures):
    def run(seed):
        return [d.explanation for d in pipeline.detect(pictures, max_new_tokens=5, temperature=2.0, seed=seed)]

    assert run(0) == run(0)
    assert run(0) != run(1)


class Recorder(PixelAutoencoder):
    """Says how often it encoded, and refuses to sample."""

    calls = 0

    def encode(self, pixels, *, sample=False):
        assert not sample
        self.calls += 1
        return super().encode(pixels)


def captured_requests(monkeypatch, outputs=None):
    requests = []

    def detect(model, group, **options):
        requests.extend(group)
        return outputs or [DetectionOutput(torch.zeros(2)) for _ in group]

    monkeypatch.setattr(pipeline_module, "detect_packed", detect)
    return requests


def test_each_view_is_resized_once_from_the_original(tokenizer, pictures, monkeypatch):
    """docs/model.md §12.8: the published detector resized the ViT's view from the latent one and drew the latent."""
    recorder = Recorder(LatentConfig(channels=1, downsample=1, patch_size=2, max_size=4, autoencoder="pixels"))
    pipeline = make_pipeline(tokenizer, recorder)
    requests = captured_requests(monkeypatch)
    list(pipeline.detect(pictures[:1]))
    original = Image.open(pictures[0]).convert("L")  # 29×17

    def resized(width, height):
        values = np.asarray(original.resize((width, height), Image.Resampling.BICUBIC), np.float32)
        return torch.from_numpy(values / 127.5 - 1)[None]

    torch.testing.assert_close(requests[0].latent.latent, resized(8, 4))
    torch.testing.assert_close(requests[0].vit.pixels, resized(6, 4))
    assert isinstance(requests[0].latent, LatentImage)
    assert not requests[0].latent.noised
    assert recorder.calls == 1


@pytest.mark.parametrize(
    ("logits", "answer", "verdict", "probability"),
    [
        (None, "This is a real image. So it is.", "real", None),
        (None, "This is a fake image.", "fake", None),
        (None, "Who knows?", "undecided", None),
        ((0.0, 3.0), "This is a fake image.", "real", 0.9526),
        ((3.0, 0.0), "", "fake", 0.0474),
        ((1.0, 1.0), "Who knows?", "real", 0.5),
    ],
)
def test_verdict_is_the_heads_or_else_the_texts(pipeline, tokenizer, monkeypatch, logits, answer, verdict, probability):
    output = DetectionOutput(None if logits is None else torch.tensor(logits), tokenizer.encode(answer), True)
    captured_requests(monkeypatch, [output])
    (detection,) = pipeline.detect([Image.new("L", (8, 8))])
    assert (detection.verdict, detection.explanation) == (verdict, answer)
    assert detection.probability == (None if probability is None else pytest.approx(probability, abs=1e-4))


def test_model_without_head_judges_by_its_text(tokenizer, pictures):
    (detection,) = make_pipeline(tokenizer, class_head=False).detect(pictures[:1], max_new_tokens=3)
    assert (detection.verdict, detection.probability) == ("undecided", None)


def test_images_depend_on_their_own_seed_and_prompt(pipeline):
    prompts = ["a", "bc", "", "a"]
    images = pipeline.generate(prompts, guidance=GUIDANCE, seed=3)
    assert [image.size for image in images] == [(8, 8)] * 4
    again = pipeline.generate(prompts[1:], guidance=GUIDANCE, seed=4, batch_size=2)
    for a, b in zip(images[1:], again, strict=True):
        # One level of 255 apart at most: other images of the batch may change the last bits.
        assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1
    assert not np.array_equal(images[0], images[3])
    assert pipeline.generate([]) == []


def test_size_is_height_then_width_and_progress_counts_all_batches(pipeline):
    seen = []
    progress = lambda done, steps: seen.append((done, steps))  # noqa: E731
    images = pipeline.generate(["a"] * 3, size=(4, 6), guidance=GUIDANCE, batch_size=2, progress=progress)
    assert [image.size for image in images] == [(6, 4)] * 3
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_folder_round_trip(pipeline, pictures, tmp_path):
    pipeline.save(tmp_path / "model")
    loaded = Pipeline.from_pretrained(tmp_path / "model")
    assert loaded.data == VIEWS
    assert loaded.model.config == pipeline.model.config
    assert not loaded.model.training
    same(loaded.detect(pictures, max_new_tokens=5), pipeline.detect(pictures, max_new_tokens=5))
    before, after = (p.generate(["a"], guidance=GUIDANCE, seed=1)[0] for p in (pipeline, loaded))
    assert np.array_equal(before, after)
    low = Pipeline.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert {p.dtype for p in low.model.parameters()} == {torch.bfloat16}
    pairs = zip(*(p.detect(pictures, max_new_tokens=0) for p in (low, loaded)), strict=True)
    for one, other in pairs:
        assert one.probability == pytest.approx(other.probability, abs=0.05)


def test_errors(pipeline, pictures, tmp_path):
    (tmp_path / "notes.png").write_text("no image")
    with pytest.raises(ValueError, match=r"notes\.png cannot be decoded"):
        list(pipeline.detect([*pictures, tmp_path / "notes.png"]))
    for call in (lambda: list(pipeline.detect(pictures, batch_size=0)), lambda: pipeline.generate(["a"], batch_size=0)):
        with pytest.raises(ValueError, match="batch_size is 0; it must be positive"):
            call()
    for size in ((7, 8), (16, 8), (-2, 4), (0, 8)):
        with pytest.raises(ValueError, match=r"size is .*multiples of 2 pixels and at most 8"):
            pipeline.generate(["a"], size=size)


def test_folder_errors(pipeline, tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="no model folder at"):
        Pipeline.from_pretrained(tmp_path / "nowhere")
    pipeline.save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"must be left out with latent\.autoencoder 'pixels'"):
        Pipeline.from_pretrained(tmp_path / "model", autoencoder=tmp_path / "ae.safetensors")
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer folder .*model lacks"):
        Pipeline.from_pretrained(tmp_path / "model")
    flux = LatentConfig(channels=16, downsample=8, patch_size=2, max_size=4)
    large = dataclasses.replace(VIEWS, latent_view=ImageConfig(min_size=16, max_size=64, stride=16))
    Pipeline(tiny_model(vocab_size=280, latent=flux), tokenizer, PixelAutoencoder(flux), large).save(tmp_path / "flux")
    with pytest.raises(FileNotFoundError, match=r"ae\.safetensors does not exist; say where"):
        Pipeline.from_pretrained(tmp_path / "flux")


@pytest.mark.parametrize(
    "content",
    ['{"interval": 3}', '{"interval": [0.4]}', '{"interval": ["a", 1]}', '{"num_timesteps": "3"}', '{"steps": 3}',
     "[]", "3", "{", ""],
)  # fmt: skip
def test_damaged_sampling_settings_are_named(tmp_path, content):
    (tmp_path / "generation.json").write_text(content)
    with pytest.raises(ValueError, match=r"generation\.json does not hold sampling settings: "):
        load_guidance(tmp_path)
