"""Mistakes that show before anything is loaded, in a run and in a dry run."""

import json

import pytest
from run_data import write_run_data, write_run_settings
from tiny_models import tiny_model

import unigendet.training.run as run_module
from unigendet.cli import main
from unigendet.config import bagel_7b
from unigendet.config_file import load_settings
from unigendet.model.checkpoint import save_pretrained
from unigendet.quickstart import default_config
from unigendet.training.config import TrainConfig, load_train_config
from unigendet.training.preflight import (
    check_layers,
    missing_paths,
    model_settings,
    planned_processes,
)


def settings(*overrides):
    return load_settings(TrainConfig, None, overrides)


@pytest.fixture
def run_file(tmp_path):
    write_run_data(tmp_path)
    return write_run_settings(tmp_path / "run.yaml", tmp_path, tmp_path / "out")


@pytest.fixture
def cli(run_file, capsys, monkeypatch):
    """Run ``unigendet train`` where nothing may be loaded; exit code, output, errors."""

    def load(*arguments):
        raise AssertionError("something was loaded before the settings were checked")

    for name in ("build_tokenizer", "build_model", "build_autoencoder"):
        monkeypatch.setattr(run_module, name, load)

    def run(*arguments):
        code = main(["train", "--config", str(run_file), *map(str, arguments)])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return run


EVERYTHING = (
    "model.checkpoint=lost",
    "model.tokenizer=words",
    "model.autoencoder=ae.safetensors",
    "datasets.detection=[{file: a.json, image_root: b}]",
    "datasets.captions=[{file: c.json}, {file: d.json, image_root: e}]",
    "watch.every=1",
    "watch.prompts_file=p.txt",
    "watch.detection=held",
    "watch.image_root=f",
)


def names(lines):
    return [line.partition(" ")[0] for line in lines]


def test_every_path_is_named():
    everything = [
        "model.checkpoint",
        "model.tokenizer",
        "model.autoencoder",
        "datasets.detection[0].file",
        "datasets.detection[0].image_root",
        "datasets.captions[0].file",
        "datasets.captions[1].file",
        "datasets.captions[1].image_root",
        "watch.prompts_file",
        "watch.detection",
        "watch.image_root",
    ]
    assert names(missing_paths(settings(*EVERYTHING))) == everything
    assert missing_paths(settings(*EVERYTHING))[1] == "model.tokenizer is 'words'; there is no such folder"
    diga = names(missing_paths(settings(*EVERYTHING, "stage=diga")))
    assert diga == [name for name in everything if "datasets.detection" not in name], "DIGA does not read detection"
    unwatched = names(missing_paths(settings(*EVERYTHING, "watch.every=0")))
    assert unwatched == everything[:-3], "a run that does not look does not read what it would look at"


def test_a_resumed_run_does_not_need_the_checkpoint_it_began_with():
    config = settings("model.checkpoint=lost", "model.tokenizer=words")
    assert names(missing_paths(config, resuming=True)) == ["model.tokenizer"]
    config = settings("model.checkpoint=lost")
    assert names(missing_paths(config, resuming=True)) == ["model.checkpoint"], "its tokenizer is read"


def test_kinds(tmp_path):
    (tmp_path / "file").write_text("")
    (file,) = missing_paths(settings(f"model.tokenizer={tmp_path / 'file'}"))
    assert file == f"model.tokenizer is '{tmp_path / 'file'}'; it must be a folder"
    (folder,) = missing_paths(settings(f"model.autoencoder={tmp_path}"))
    assert folder == f"model.autoencoder is '{tmp_path}'; it must be a file"
    assert missing_paths(settings(f"model.tokenizer={tmp_path}", f"model.autoencoder={tmp_path / 'file'}")) == []


def test_processes(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert planned_processes(settings()) == 1
    assert planned_processes(settings("parallel={replicate: 2, shard: 8}")) == 16
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert planned_processes(settings("parallel={replicate: 2, shard: 8}")) == 4


def test_layers():
    with pytest.raises(ValueError, match=r"teacher_layer is 29; it must be in 1\.\.28, the model's decoder layers"):
        check_layers(settings("stage=diga", "teacher_layer=29"), bagel_7b())
    check_layers(settings("teacher_layer=29"), bagel_7b())  # GDUF has no teacher


def test_where_the_sizes_come_from(tmp_path):
    assert model_settings(settings("model.checkpoint=lost", "model.sizes=bagel_7b")) == bagel_7b()
    assert model_settings(settings("model.preset=bagel_7b")) == bagel_7b()
    with pytest.raises(ValueError, match=r"model\.checkpoint is 'lost'; .* name a preset .* say model\.sizes=bagel_7b"):
        model_settings(settings("model.checkpoint=lost"))
    model = tiny_model()
    save_pretrained(model, tmp_path / "model")
    here = f"model.checkpoint={tmp_path / 'model'}"
    assert model_settings(settings(here)) == model.config
    assert model_settings(settings(here, "model.align_projector=conv")).align_projector == "conv"
    with pytest.raises(ValueError, match=r"model\.sizes is 'bagel_7b', but the checkpoint has hidden_size 32 and not"):
        model_settings(settings(here, "model.sizes=bagel_7b"))
    with pytest.raises(ValueError, match=r"model\.sizes is 'bagel_7b'; it must be null without model\.checkpoint"):
        settings("model.preset=bagel_7b", "model.sizes=bagel_7b")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", "there is no setting 'optimizer.lrr'"),
        ("total_steps=many", "total_steps is 'many'"),
        ("parallel.shard=0", "parallel.shard is 0; it must be positive"),
        ("accumulate=0", "accumulate is 0; it must be positive"),
        (
            "parallel.shard=2",
            "parallel.shard is 2; it must be 1, so that parallel.replicate (1) times it is",
        ),
        ("stage=diga teacher_layer=4", "teacher_layer is 4; it must be in 1..3"),
    ],
)
def test_mistakes_end_a_run_and_a_dry_run(cli, override, message):
    code, out, err = cli(*override.split())
    assert (code, out) == (1, "")
    assert message in err
    dry_run = ("--dry-run", "--world-size", 1) if "shard=2" in override else ("--dry-run",)
    code, out, err = cli(*override.split(), *dry_run)
    assert (code, out) == (1, "")
    assert message in err


def test_missing_files_end_a_run_and_warn_in_a_dry_run(cli, tmp_path):
    lost = f"datasets.captions=[{{file: {tmp_path / 'lost.json'}}}]"
    line = f"datasets.captions[0].file is '{tmp_path / 'lost.json'}'; there is no such file\n"
    assert cli(lost) == (1, "", f"unigendet train: {line}")
    code, out, err = cli(lost, "--dry-run")
    assert (code, err) == (0, f"unigendet train: warning: {line}")
    assert "Device memory per rank" in out


def test_a_dry_run_writes_nothing(cli, tmp_path):
    before = sorted(tmp_path.iterdir())
    code, out, err = cli("--dry-run", "--world-size", 2)
    assert (code, err) == (0, "")
    assert "2: 1 copy of the model, each sharded over 2" in out
    assert sorted(tmp_path.iterdir()) == before
    assert cli("--world-size", 2)[0] == 1, "without --dry-run"


def test_the_quickstart_s_vocabulary_is_the_tokenizer_s(cli, run_file):
    words = len(json.loads((run_file.parent / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"])
    config = model_settings(load_train_config(run_file))
    assert config.vocab_size >= words
    assert config.vocab_size < 512, "the preset's"


def test_the_published_recipes_fit_without_weights(tmp_path, monkeypatch, capsys):
    """As on a laptop: neither GPU nor weights nor data, and 8 GPUs of 80 GB are planned for."""
    recipes = [default_config(f"{stage}_bagel7b.yaml") for stage in ("gduf", "diga")]
    monkeypatch.chdir(tmp_path)
    for recipe in recipes:
        assert main(["train", "--config", str(recipe), "--dry-run"]) == 0
        captured = capsys.readouterr()
        assert "14,681,017,954" in captured.out
        assert "fits 80 GB" in captured.out
        assert "warning: model.checkpoint is" in captured.err
