"""Where a run's samples come from: annotation files, folders, one label only, both labels equally often."""

import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from PIL import Image
from run_data import write_run_data, write_run_settings

from unigendet.data.datasets import SampleBuilder, parse_verdict
from unigendet.data.labelled import VERDICTS
from unigendet.data.loader import Loader
from unigendet.model.autoencoder import build_autoencoder
from unigendet.training.config import AnnotationFile, DatasetsConfig, load_train_config
from unigendet.training.preflight import model_settings
from unigendet.training.sources import build_sources, build_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    write_run_data(folder)
    write_run_settings(folder / "run.yaml", folder, None)
    rng = np.random.default_rng(0)
    for name, count in {"real": 2, "fake/gan": 5, "fake/diffusion/deep": 1}.items():
        (folder / "images" / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{i}.png")
    return folder


def sources(folder, *overrides):
    config = load_train_config(folder / "run.yaml", overrides)
    tokenizer = build_tokenizer(config)
    model = model_settings(config, tokenizer)
    builder = SampleBuilder(model, tokenizer, config.datasets.views, encode=build_autoencoder(model.latent).encode)
    return build_sources(config, builder), builder, config


def of_folder(folder, **values):
    return "datasets.detection=" + json.dumps([{"file": str(folder / "images"), **values}])


def test_a_folder_of_labelled_images(folder):
    (detection, captions), builder, _ = sources(folder, of_folder(folder))
    assert detection.name == str(folder / "images")
    assert Counter(record.label for record in detection.records) == {1: 2, 0: 6}
    for record in detection.records:
        assert record.question == "Is this image real or fake and why?"
        assert record.answer == VERDICTS[record.label]
        assert parse_verdict(record.answer) == record.label
        sample = detection.build(record)
        question, answer = sample.segments[-2:]
        assert builder.tokenizer.decode(question.ids) == record.question
        assert builder.tokenizer.decode(answer.ids) == record.answer
        assert answer.loss
        assert sample.label == record.label
    assert len(captions.records) == 6


def test_a_folder_asks_the_question_of_the_views(folder):
    (detection, _), *_ = sources(folder, of_folder(folder), "datasets.views.question=Real?")
    assert {record.question for record in detection.records} == {"Real?"}
    # annotations keep their own
    (detection, _), *_ = sources(folder, "datasets.views.question=Is it?")
    assert {record.question for record in detection.records} == {"Real?"}


def test_balance_draws_both_labels_equally_often(folder):
    (real, fake, captions), builder, config = sources(folder, of_folder(folder, balance=True, weight=3))
    assert (real.name, fake.name) == (f"{folder / 'images'} (real)", f"{folder / 'images'} (fake)")
    assert (real.weight, fake.weight, captions.weight) == (1.5, 1.5, 2)
    assert ({r.label for r in real.records}, {r.label for r in fake.records}) == ({1}, {0})
    assert (len(real.records), len(fake.records)) == (2, 6)
    drawn = Counter(
        sample.label
        for pack in islice(Loader([real, fake, captions], config.loader, length=builder.length), 50)
        for sample in pack
    )
    assert abs(drawn[1] - drawn[0]) <= 1
    assert drawn[None] == pytest.approx(drawn.total() * 2 / 5, abs=2)


def test_one_label_only(folder):
    (detection, _), *_ = sources(folder, of_folder(folder, label=1))
    assert {record.label for record in detection.records} == {1}


def test_what_cannot_be_balanced(folder):
    entries = json.loads((folder / "detection.json").read_text())
    (folder / "real.json").write_text(json.dumps([{**entry, "label": 1} for entry in entries]))
    data = "datasets.detection=" + json.dumps([{"file": str(folder / "real.json"), "balance": True}])
    with pytest.raises(ValueError, match=r"balance is true, and .*real\.json has no record with label 0"):
        sources(folder, data)
    with pytest.raises(ValueError, match=r"balance of a\.json is True; it must be false with a label"):
        AnnotationFile("a.json", balance=True, label=0)
    for values in ({"balance": True}, {"label": 1}):
        with pytest.raises(ValueError, match=r"datasets.captions: a\.json is .*; it must be without label and balance"):
            DatasetsConfig(captions=(AnnotationFile("a.json", **values),))


def test_a_folder_has_no_image_root(folder):
    with pytest.raises(ValueError, match=r"datasets\.detection\[0\]\.image_root is 'x'; leave it out"):
        sources(folder, of_folder(folder, image_root="x"))
