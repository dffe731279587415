"""A calibration belongs to one model, question and choice of views; any other is refused."""

import dataclasses
import math

import pytest
import torch
from command_runs import noise_picture, tiny_pipeline

from unigendet.inference.calibration import SAMPLES, Calibration, model_fingerprint


def test_a_calibration_fits_one_model_and_one_use():
    pipeline = tiny_pipeline()
    fitted = Calibration(
        model=model_fingerprint(pipeline.model, pipeline.data), question=pipeline.data.question, with_latent=True
    )
    image = noise_picture(0)
    (plain,) = pipeline.detect([image], max_new_tokens=0)
    (same,) = pipeline.detect([image], max_new_tokens=0, calibration=fitted)
    assert same == plain
    (other,) = pipeline.detect([image], max_new_tokens=0, calibration=dataclasses.replace(fitted, temperature=3.0))
    assert other.logit == plain.logit
    assert other.probability == pytest.approx(1 / (1 + math.exp(-plain.logit / 3)))
    for options, message in (
        (
            {"question": "Why?"},
            r"fitted with the question 'Is this .*', not 'Why\?'; ask that question \(--question\), or",
        ),
        ({"with_latent": False}, "fitted with the latent view; calibrate anew"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline.detect([image], calibration=fitted, **options)


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("class_head.", True),
        ("decoder.layers.1.qkv.gen.weight", True),
        ("decoder.layers.2.down.und.weight", True),
        ("vae2llm.weight", True),
        ("time_embedding.", True),
        ("vision.patch_embedding.weight", True),
        ("lm_head.weight", False),
        ("llm2vae.weight", False),
    ],
)
def test_another_weight_is_another_model_if_a_verdict_reads_it(name, refused):
    """The generator's training changes the generation stream, through which the detector's latent view runs."""
    pipeline = tiny_pipeline()
    fitted = Calibration(model=model_fingerprint(pipeline.model, pipeline.data))
    changed = next(p for n, p in pipeline.model.named_parameters() if n.startswith(name))
    with torch.no_grad():
        changed.view(-1)[-1] += 0.5
    if refused:
        with pytest.raises(ValueError, match="fitted to another model: its weights or its views differ"):
            pipeline.detect([noise_picture(0)], calibration=fitted)
    else:
        pipeline.detect([noise_picture(0)], calibration=fitted)


@pytest.mark.parametrize("view", ["latent_view", "vit_view"])
def test_other_views_are_another_model(view):
    pipeline = tiny_pipeline()
    fitted = Calibration(model=model_fingerprint(pipeline.model, pipeline.data))
    smaller = dataclasses.replace(getattr(pipeline.data, view), min_size=4)
    pipeline.data = dataclasses.replace(pipeline.data, question="Why?", teacher_prompt="{caption}!")
    pipeline.detect([noise_picture(0)], calibration=fitted)
    pipeline.data = dataclasses.replace(pipeline.data, **{view: smaller})
    with pytest.raises(ValueError, match="fitted to another model: its weights or its views differ"):
        pipeline.detect([noise_picture(0)], calibration=fitted)


def test_large_tensors_are_sampled_all_over():
    pipeline = tiny_pipeline()
    weight = pipeline.model.embed_tokens.weight
    assert weight.numel() > 8 * SAMPLES
    before = model_fingerprint(pipeline.model, pipeline.data)
    for part in weight.detach().view(8, -1):
        part += 0.5
        after = model_fingerprint(pipeline.model, pipeline.data)
        assert after != before
        before = after


def test_the_fingerprint_does_not_depend_on_the_dtype():
    pipeline, headless = tiny_pipeline(), tiny_pipeline(class_head=False)
    expected = model_fingerprint(pipeline.model, pipeline.data)
    assert model_fingerprint(pipeline.model.to(torch.bfloat16), pipeline.data) == expected
    with pytest.raises(ValueError, match="no real/fake head"):
        model_fingerprint(headless.model, headless.data)
