"""``unigendet data check``: what it counts, what it calls broken, and that training sees the same."""

import functools
import json
import shutil
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from checked_data import annotate, check_data, write_checked_data
from command_runs import run_command
from PIL import Image

from unigendet.commands.data_report import histogram
from unigendet.data import check
from unigendet.data.datasets import SampleBuilder
from unigendet.data.loader import Loader
from unigendet.model.autoencoder import build_autoencoder
from unigendet.training.config import load_train_config
from unigendet.training.preflight import model_settings
from unigendet.training.sources import build_sources, build_tokenizer, data_sets


@pytest.fixture
def folder(tmp_path):
    return write_checked_data(tmp_path)


@pytest.fixture
def checked(capsys, folder):
    return functools.partial(check_data, capsys, folder)


@pytest.mark.parametrize("workers", [0, 2])
def test_all_is_well(checked, folder, workers):
    result, found = checked(workers=workers)
    assert result.code == 0
    assert result.lines[-1] == "nothing is broken in 12 samples"
    detection, captions = found["sources"]
    assert found["ok"]
    assert (detection["records"], detection["checked"], detection["labels"]) == (6, 6, {"real": 3, "fake": 3})
    assert (captions["records"], captions["labels"], captions["broken"]) == (6, None, [])
    assert "  records  6: 3 real, 3 fake" in result.lines
    assert f"{folder / 'captions.json'}" in result.lines


@pytest.mark.parametrize("stage", ["gduf", "diga"])
def test_tokens_are_those_of_training(checked, folder, stage):
    """Counted without decoding a view: the same numbers that a loader's samples have."""
    settings = [f"stage={stage}", "align_layer=2", "teacher_layer=3"]
    _, found = checked(*settings)
    config = load_train_config(folder / "run.yaml", settings)
    tokenizer = build_tokenizer(config)
    model = model_settings(config, tokenizer)
    encode = build_autoencoder(model.latent).encode
    builder = SampleBuilder(model, tokenizer, config.datasets.views, encode=encode)
    sources = build_sources(config, builder)
    assert len(found["sources"]) == len(sources) == {"gduf": 2, "diga": 1}[stage]
    for source, one in zip(sources, found["sources"], strict=True):
        items = [source.build(record) for record in source.records]
        lengths = sorted(builder.length(item[0] if stage == "diga" else item) for item in items)
        assert len(set(lengths)) > 1
        assert one["tokens"] == {"min": lengths[0], "median": lengths[3], "p95": lengths[5], "max": lengths[5]}
    loader = Loader(sources, config.loader, length=builder.length)
    items = [item for pack in islice(loader, 500) for item in pack]
    assert found["packs"]["samples_per_pack"] == len(items) / 500
    tokens = sum(builder.length(item[0] if stage == "diga" else item) for item in items)
    assert found["packs"]["fill"] == tokens / (500 * config.loader.max_tokens)


def test_broken_images_are_listed(checked, folder, monkeypatch):
    (folder / "1.png").unlink()
    (folder / "4.png").write_text("no image")
    decoded = Counter()
    read = check.read_image

    def counted(path):
        decoded[path.name] += 1
        return read(path)

    monkeypatch.setattr(check, "read_image", counted)
    result, found = checked()
    assert result.code == 1
    assert decoded == Counter({f"{i}.png": 1 for i in range(6)})  # although each is in both data sets
    assert not found["ok"]
    broken = [(one["image"], one["where"]) for source in found["sources"] for one in source["broken"]]
    assert broken == [(str(folder / f"{i}.png"), f"{folder / kind}.json, entry {i}") for kind in
                      ("detection", "captions") for i in (1, 4)]  # fmt: skip
    lines = [line for line in result.lines if line.startswith("image ")]
    assert len(lines) == 4
    assert lines[0].startswith(f"image {folder / '1.png'} does not exist")
    assert lines[0].endswith(f"({folder / 'detection.json'}, entry 1)")
    assert "image_root says where the images of a data set are" in result.lines
    assert result.lines[-1] == "4 of 12 samples are broken"
    assert found["packs"]["packed"] == 500  # what is left is packed all the same


def test_many_broken_images(checked, folder):
    entries = json.loads((folder / "captions.json").read_text())
    (folder / "captions.json").write_text(
        json.dumps([*entries, *({**entries[0], "image_path": f"x{i}.png"} for i in range(25))])
    )
    result, found = checked()
    assert sum(line.startswith("image ") for line in result.lines) == 20
    assert "and 5 more (--json FILE lists all)" in result.lines
    assert len(found["sources"][1]["broken"]) == 25


def test_a_malformed_annotation_does_not_hide_the_rest(checked, folder):
    annotate(folder, "detection", 3, label=2)
    (folder / "2.png").unlink()
    result, found = checked()
    assert result.code == 1
    reason = f"{folder / 'detection.json'}, entry 3, field 'label' is 2; it must be 1 (real) or 0 (fake)"
    assert found["malformed"] == [{"file": str(folder / "detection.json"), "entry": 3, "reason": reason}]
    assert reason in result.lines
    assert [source["records"] for source in found["sources"]] == [5, 6]
    assert found["packs"]["packed"] == 500  # what is sound is packed all the same
    assert result.lines[-1] == "2 of 11 samples are broken; 1 entry is malformed"
    annotate(folder, "detection", 3, label=3, cate=7)
    annotate(folder, "detection", 5, conversations=[])
    result, found = checked()
    assert [one["entry"] for one in found["malformed"]] == [3, 3, 5]
    assert result.lines[-1] == "2 of 10 samples are broken; 2 entries are malformed"


def test_a_data_set_that_cannot_be_read(checked, folder):
    """It is among the sources all the same, and the others are looked at."""
    captions = f"datasets.captions=[{{file: {folder / 'lost.json'}}}, {{file: {folder / 'captions.json'}}}]"
    result, found = checked(captions)
    assert result.code == 1
    assert [source["records"] for source in found["sources"]] == [6, 0, 6]
    lost = found["sources"][1]
    assert (lost["name"], lost["kind"]) == (str(folder / "lost.json"), "captions")
    assert found["unread"] == [lost["error"]] == [f"annotation file {folder / 'lost.json'} does not exist"]
    assert lost["error"] in result.lines
    assert found["packs"] is None
    assert result.lines[-1] == "1 file or folder is of no use"
    result, found = checked(f"datasets.detection=[{{file: {folder / 'captions.json'}}}]")
    assert found["sources"][0]["error"] == f"annotation file {folder / 'captions.json'} has no sound entry"
    assert len(found["malformed"]) == 6 * 4  # label, conversations, image and cate
    assert "and 4 more (--json FILE lists all)" in result.lines
    assert result.lines[-1] == "6 entries are malformed; 1 file or folder is of no use"


def test_a_data_set_without_its_images(checked, folder):
    """One line instead of one for each image."""
    (folder / "other").mkdir()
    captions = f"[{{file: {folder / 'captions.json'}, image_root: {folder / 'other'}}}]"
    result, found = checked(f"datasets.captions={captions}", "--sample", 2)
    assert result.code == 1
    assert len(found["sources"][1]["broken"]) == 2
    lines = [line for line in result.lines if str(folder / "other") in line]
    assert lines == [
        f"{folder / 'captions.json'}: all 2 images that were looked at are missing, the first is "
        f"{folder / 'other' / '0.png'}; datasets.captions[0].image_root says what its paths are relative to"
    ]
    assert result.lines[-1] == "2 of 4 samples are broken"


def test_decoders_are_silent(folder, capfd):
    """What a library in C writes of damaged files would bury what is found."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "0.tif", compression="tiff_adobe_deflate")
    damaged = bytearray((folder / "0.tif").read_bytes())
    damaged[5000:5100] = bytes(100)
    (folder / "0.tif").write_bytes(damaged)
    annotate(folder, "captions", 0, image_path="0.tif")
    result = run_command(capfd, "data", "check", folder / "run.yaml", "--workers", 3)
    assert result.code == 1
    assert f"image {folder / '0.tif'} cannot be decoded" in result.out
    assert result.err == ""


def test_samples_that_are_too_long(checked, folder):
    annotate(folder, "captions", 2, prompt="picture " * 200)
    result, found = checked()
    assert result.code == 0  # training leaves it out
    (long,) = found["sources"][1]["too_long"]
    assert long["name"] == str(folder / "2.png")
    assert long["tokens"] == found["sources"][1]["tokens"]["max"] > 150
    line = f"  above loader.max_sample_tokens = 150: 1: {folder / '2.png'} ({long['tokens']:,})"
    assert line in result.lines
    for i in range(6):
        annotate(folder, "captions", i, prompt="picture " * 200)
    result, found = checked()
    assert result.code == 1
    assert f"{folder / 'captions.json'} has no sample that a pack can hold" in result.lines


def test_a_sample_of_the_images(checked, folder):
    (folder / "1.png").unlink()
    result, found = checked("--sample", 2)
    assert result.code == 0  # 0 and 3 are there
    assert [source["checked"] for source in found["sources"]] == [2, 2]
    assert [source["records"] for source in found["sources"]] == [6, 6]
    assert "  records  6: 3 real, 3 fake, 2 of them looked at" in result.lines
    assert found["packs"]["packs_per_epoch"][0] > 1
    assert checked("--sample", 100)[1]["sources"][0]["checked"] == 6


def test_balance_and_folders(checked, folder):
    for name, images in {"real": "012", "fake/gan": "3"}.items():
        (folder / "labelled" / name).mkdir(parents=True)
        for image in images:
            shutil.copy(folder / f"{image}.png", folder / "labelled" / name)
    data = f"datasets.detection=[{{file: {folder / 'labelled'}, balance: %s}}]"
    unbalanced = checked(data % "false")[1]
    assert unbalanced["packs"]["real"] == pytest.approx(0.75)
    assert [s["labels"] for s in unbalanced["sources"][:1]] == [{"real": 3, "fake": 1}]
    balanced = checked(data % "true")[1]
    assert balanced["packs"]["real"] == pytest.approx(0.5, abs=0.01)
    real, fake, _ = balanced["packs"]["packs_per_epoch"]
    assert real == pytest.approx(3 * fake, rel=0.01)


def test_mistakes(checked, folder):
    assert "--sample is 0; it must be at least 1" in checked("--sample", 0)[0].err
    assert "--workers is -1; it must be at least 0" in checked(workers=-1)[0].err
    assert "there is no setting 'lodaer'" in checked("lodaer.seed=1")[0].err
    result = checked("stage=diga", "datasets.captions=[]")[0]
    assert result.code == 1
    assert result.err.startswith("unigendet data check: datasets.captions is empty; DIGA needs")


def test_overrides_may_follow_options(checked):
    assert checked("loader.lookahead=3", "--sample", 3, "loader.max_tokens=400")[1]["packs"]["lookahead"] == 3


def test_histogram():
    lines = histogram([100, 101, 150, 199, 250, 999])
    assert lines[0].split() == ["100", "to", "199", "66.7%", "#" * 40]
    assert lines[1].split() == ["200", "to", "299", "16.7%", "#" * 10]
    assert lines[2].split() == ["300", "to", "399", "0.0%"]
    assert lines[-1].split() == ["900", "to", "999", "16.7%", "#" * 10]
    assert histogram([7]) == ["7 to 7  100.0%  " + "#" * 40]
    for values in ([1, 2], range(3, 100_000, 7), [5, 5, 6_000]):
        shares = [float(line.split("%")[0].split()[-1]) for line in histogram(list(values))]
        assert len(shares) <= 13
        assert sum(shares) == pytest.approx(100, abs=0.6)


def test_nothing_is_read_before_it_is_asked_for(folder):
    """So that one data set's mistakes do not keep the others from being looked at."""
    annotate(folder, "detection", 0, label=7)
    config = load_train_config(folder / "run.yaml")
    tokenizer = build_tokenizer(config)
    builder = SampleBuilder(model_settings(config, tokenizer), tokenizer, config.datasets.views)
    first, second = data_sets(config, builder)
    with pytest.raises(ValueError, match="field 'label' is 7"):
        first.read()
    (source,) = second.read()
    assert len(source.records) == 6
