"""``unigendet data check``: what it counts, what it calls broken, and that training sees the same."""

import json
import shutil
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from command_runs import run_command
from PIL import Image
from run_data import write_run_data, write_run_settings

from unigendet.commands.data_report import histogram
from unigendet.data import check
from unigendet.data.consistency import RealPaths
from unigendet.data.datasets import SampleBuilder
from unigendet.data.loader import Loader
from unigendet.model.autoencoder import build_autoencoder
from unigendet.training.config import load_train_config
from unigendet.training.preflight import model_settings
from unigendet.training.sources import build_sources, build_tokenizer, data_sets


@pytest.fixture
def folder(tmp_path):
    write_run_data(tmp_path)
    for i, size in enumerate([(8, 8), (4, 8), (8, 6), (8, 4), (30, 30), (6, 6)]):
        Image.new("L", size, i).save(tmp_path / f"{i}.png")
    view = {"min_size": 2, "max_size": 8, "stride": 2}
    datasets = {
        "detection": [{"file": str(tmp_path / "detection.json")}],
        "captions": [{"file": str(tmp_path / "captions.json"), "weight": 2}],
        "views": {"latent_view": view, "vit_view": view},
    }
    write_run_settings(tmp_path / "run.yaml", tmp_path, None, datasets=datasets)
    return tmp_path


@pytest.fixture
def checked(capsys, folder):
    """Runs the check; its result and what it wrote as JSON."""

    def run(*arguments, workers=0):
        out = folder / "out.json"
        out.unlink(missing_ok=True)
        options = ["--workers", workers, "--json", out, *arguments]
        result = run_command(capsys, "data", "check", folder / "run.yaml", *options)
        return result, json.loads(out.read_text()) if out.exists() else None

    return run


def annotate(folder, kind, i, **values):
    file = folder / f"{kind}.json"
    entries = json.loads(file.read_text())
    entries[i].update(values)
    file.write_text(json.dumps(entries))


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


def answer(folder, i, text, **values):
    turns = [{"from": "human", "value": "<image>Real?"}, {"from": "gpt", "value": text}]
    annotate(folder, "detection", i, conversations=turns, **values)


@pytest.mark.parametrize("balance", ["false", "true"])
def test_labels_that_contradict_their_answers(checked, folder, balance):
    answer(folder, 0, "This is a real image. The digit …")
    answer(folder, 1, "this is a FAKE image")
    answer(folder, 2, "The picture looks like what a generator makes of it. " * 3)
    result, found = checked(f"datasets.detection=[{{file: {folder / 'detection.json'}, balance: {balance}}}]")
    assert result.code == 1
    wrong = [one for source in found["sources"] for one in source["contradictions"]]
    assert sorted((one["where"], one["label"], one["text"]) for one in wrong) == [
        (f"{folder / 'detection.json'}, entry 0", 0, "This is a real image. The digit …"),
        (f"{folder / 'detection.json'}, entry 1", 1, "this is a FAKE image"),
    ]
    line = f"{folder / 'detection.json'}, entry 1: label is 1 (real), but the answer says fake: 'this is a FAKE image'"
    assert line in result.lines
    (undecided,) = (one for source in found["sources"] for one in source["undecided"])
    assert (undecided["where"], len(undecided["text"])) == (f"{folder / 'detection.json'}, entry 2", 81)
    (note,) = (line for line in result.lines if line.startswith("  note"))
    assert note.startswith(
        "  note     1 answer has no verdict (This is a real image, or a fake one), such as 'The pict"
    )
    assert result.lines[-1] == "2 labels contradict their answers"


def test_answers_without_a_verdict_are_no_mistake(checked, folder):
    for i in range(6):
        answer(folder, i, "It is hard to say.")
    result, found = checked()
    assert (result.code, found["ok"]) == (0, True)
    assert len(found["sources"][0]["undecided"]) == 6
    assert result.lines[-1] == "nothing is broken in 12 samples"


def test_repeated_images(checked, folder):
    """By another name, too; with both labels it is a mistake."""
    (folder / "again.png").symlink_to(folder / "3.png")
    annotate(folder, "detection", 1, image="again.png")
    annotate(folder, "captions", 1, image_path="0.png")
    result, found = checked()
    assert result.code == 0
    labelled, captions = found["sources"]
    assert labelled["repeated"] == [{"image": str(folder / "3.png"), "times": 2}]
    assert captions["repeated"] == [{"image": str(folder / "0.png"), "times": 2}]
    assert f"  note     1 image occurs more than once, such as {folder / '3.png'} (2 times)" in result.lines
    annotate(folder, "detection", 0, image="3.png")
    result, found = checked()
    assert result.code == 1
    real, fake = (f"{folder / 'detection.json'}, entry {i}" for i in (1, 0))
    assert found["both_labels"] == [{"image": str(folder / "3.png"), "real": real, "fake": fake}]
    assert f"{folder / '3.png'} is real ({real}) and fake ({fake})" in result.lines
    assert result.lines[-1] == "1 image has both labels"


def test_both_labels_in_two_data_sets(checked, folder):
    (folder / "labelled" / "real").mkdir(parents=True)
    (folder / "labelled" / "real" / "0.png").symlink_to(folder / "0.png")
    data = f"[{{file: {folder / 'detection.json'}}}, {{file: {folder / 'labelled'}}}]"
    result, found = checked(f"datasets.detection={data}")
    assert result.code == 1
    (both,) = found["both_labels"]
    assert both["real"] == str(folder / "labelled" / "real" / "0.png")


@pytest.fixture
def looks(folder):
    """Held-out images, and the settings with which a run looks at them."""
    (folder / "held_out").mkdir()
    write_run_data(folder / "held_out")
    (folder / "prompts.txt").write_text("a picture\nanother\n")
    held_out = folder / "held_out" / "detection.json"
    return ["watch.every=1", f"watch.detection={held_out}", f"watch.prompts_file={folder / 'prompts.txt'}"]


def test_held_out_images(checked, folder, looks):
    plain = checked()[1]
    assert (plain["held_out"], plain["prompts"]) == (None, None)
    assert checked(*looks[1:])[1] == plain  # a run that never looks
    result, found = checked(*looks)
    assert result.code == 0
    held_out = found["held_out"]
    assert (held_out["kind"], held_out["records"], held_out["checked"]) == ("held_out", 6, 6)
    assert (held_out["labels"], held_out["tokens"], found["prompts"]) == ({"real": 3, "fake": 3}, None, 2)
    assert result.lines[-1] == "nothing is broken in 12 samples and 6 held-out images"
    for name in ("sources", "packs"):
        assert found[name] == plain[name]
    (folder / "held_out" / "0.png").write_text("no image")
    (folder / "held_out" / "5.png").unlink()
    result, found = checked(*looks)
    assert result.code == 1
    assert [one["where"] for one in found["held_out"]["broken"]] == [
        f"{folder / 'held_out' / 'detection.json'}, entry {i}" for i in (0, 5)
    ]
    assert result.lines[-1] == "2 of 6 held-out images are broken"
    result, found = checked(*looks, "watch.limit=2")  # entries 0 and 1
    assert found["held_out"]["checked"] == 2
    assert result.lines[-1] == "1 of 2 held-out images are broken"


def test_held_out_images_that_are_trained_on(checked, folder, looks):
    (folder / "held_out" / "4.png").unlink()
    (folder / "held_out" / "4.png").symlink_to(folder / "2.png")
    result, found = checked(*looks)
    assert result.code == 0
    assert [source["held_out_too"] for source in found["sources"]] == [[str(folder / "2.png")]] * 2
    assert (
        f"  note     1 image is among the held-out ones too, such as {folder / '2.png'}: scores on them say little"
        in (result.lines)
    )


def test_held_out_data_of_no_use(checked, folder, looks):
    result, found = checked(*looks, f"watch.image_root={folder / 'tokenizer'}")
    line = (
        f"{folder / 'held_out' / 'detection.json'}: all 6 images are missing, the first is "
        f"{folder / 'tokenizer' / '0.png'}; watch.image_root says what its paths are relative to"
    )
    assert line in result.lines
    assert found["packs"]["packed"] == 500
    (folder / "prompts.txt").write_text("# nothing\n")
    annotate(folder / "held_out", "detection", 2, label=7)
    result, found = checked(*looks)
    assert result.code == 1
    assert found["unread"] == [f"watch.prompts_file: {folder / 'prompts.txt'} holds no prompt"]
    assert result.lines[-1] == "1 entry is malformed; 1 file or folder is of no use"
    result, found = checked(looks[0], f"watch.detection={folder / 'lost'}")
    assert found["held_out"]["error"] == f"watch.detection is '{folder / 'lost'}'; there is no such file or folder"
    assert result.lines[-1] == "1 file or folder is of no use"


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


def test_real_paths(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(b"")
    (tmp_path / "a" / "link.png").symlink_to("x.png")
    (tmp_path / "b").symlink_to("a")
    real_path = RealPaths()
    for name in ("a/x.png", "a/link.png", "b/x.png", "b/link.png", "a/lost.png", "lost/x.png"):
        assert real_path(tmp_path / name) == str((tmp_path / name).resolve())


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
