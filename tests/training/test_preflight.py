"""Mistakes that show before any weights are loaded, in a run and in a dry run."""

import json
import sys

import pytest
import torch
from run_data import write_run_data, write_run_settings
from tiny_models import tiny_model

import unigendet.training.run as run_module
from unigendet.cli import main
from unigendet.config import bagel_7b
from unigendet.config_file import load_settings
from unigendet.model.checkpoint import save_pretrained
from unigendet.model.unigendet import UniGenDet
from unigendet.quickstart import default_config
from unigendet.training.config import TrainConfig, load_train_config
from unigendet.training.preflight import (
    check_settings,
    missing_paths,
    model_settings,
    planned_processes,
    prepare,
    rehearse,
)


def settings(*overrides):
    return load_settings(TrainConfig, None, overrides)


@pytest.fixture
def run_file(tmp_path):
    write_run_data(tmp_path)
    return write_run_settings(tmp_path / "run.yaml", tmp_path, tmp_path / "out")


@pytest.fixture
def cli(run_file, capsys, monkeypatch):
    """Run ``unigendet train`` where no weights may be loaded; exit code, output, errors."""

    def load(*arguments, **options):
        raise AssertionError("weights were loaded before everything else was checked")

    for name in ("build_model", "load_pretrained"):
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
    with torch.device("meta"):
        model = UniGenDet(bagel_7b())
    common = ("datasets.captions=[{file: c.json}]", "model.autoencoder=ae.safetensors", "teacher_layer=29")
    with pytest.raises(ValueError, match=r"teacher_layer is 29; it must be in 1\.\.28, the model's decoder layers"):
        check_settings(settings("stage=diga", *common), model)
    check_settings(settings(*common), model)  # GDUF has no teacher


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


# The published model's latents, with views that fit them.
FLUX = (
    "model.preset=bagel_7b",
    "datasets.views.latent_view={min_size: 512, max_size: 1024, stride: 16}",
    "datasets.views.vit_view={min_size: 224, max_size: 980, stride: 14}",
)
LOOKS = ("watch.every=1", "watch.detection={folder}/detection.json")
CHECKPOINT = ("model.preset=null", "model.checkpoint={folder}/")  # with a model's name behind it

SETTINGS = [
    (["optimizer.lrr=1"], "there is no setting 'optimizer.lrr'"),
    (["total_steps=many"], "total_steps is 'many'"),
    (["parallel.shard=0"], "parallel.shard is 0; it must be positive"),
    (["accumulate=0"], "accumulate is 0; it must be positive"),
    (["stage=diga", "teacher_layer=4"], "teacher_layer is 4; it must be in 1..3"),
    (["stage=diga", "datasets.captions=[]"], "datasets.captions is empty; DIGA needs"),
    (["datasets.captions=[]", "datasets.detection=[]"], "datasets.detection and datasets.captions are empty"),
    (["model.preset=null"], "model.checkpoint and model.preset are both null; one of them must be set"),
    (["model.tokenizer=null"], "model.tokenizer is null; it must be a folder"),
    (["datasets.views.vit_view.max_size=9"], "datasets.views.vit_view.max_size is 9; it must be a positive multiple"),
    (["datasets.views.vit_view.max_size=10"], "datasets.views.vit_view.max_size is 10; it must be at most 8, what the"),
    (
        ["datasets.views.latent_view={min_size: 3, max_size: 6, stride: 3}"],
        "datasets.views.latent_view.stride is 3; it must be a multiple of the model's 2",
    ),
    (["datasets.views.teacher_prompt=x"], "datasets.views.teacher_prompt is 'x'; it must be a text that contains"),
    (
        ["datasets.detection=[{file: a, weight: -1}]"],
        "datasets.detection[0].weight of a is -1.0; it must be positive",
    ),
    (["watch.guidance.num_timesteps=1"], "watch.guidance.num_timesteps is 1; it must be at least 2"),
    (["watch.every=1"], "watch.every is 1; it must be 0 without watch.prompts"),
    (["watch.every=1", "watch.prompts=[fox]", "watch.size=[7, 7]"], "watch.size is (7, 7); it must be (height, width)"),
    (["model.autoencoder={folder}/run.yaml"], "run.yaml'; it must be left out with latent.autoencoder 'pixels'"),
    ([*FLUX], "model.autoencoder is None; it must be the file of the weights (ae.safetensors) of latent.autoencoder"),
    ([*CHECKPOINT, "bare", "stage=diga"], "stage is 'diga'; it must be 'gduf' for a model without alignment head"),
    ([*CHECKPOINT, "bare", *LOOKS], "watch.max_tokens is 0; it must be positive: the model has no real/fake head"),
]
FILES = [
    (["datasets.captions=[{file: {folder}/odd.json}]"], "datasets.captions[0]: "),
    (["datasets.captions=[{file: {folder}/odd.json}]"], "odd.json, entry 0"),
    (["datasets.detection=[{file: {folder}/real.json, label: 0}]"], "datasets.detection[0]: label is 0, and"),
    (["datasets.detection=[{file: {folder}/real.json, balance: true}]"], "datasets.detection[0]: balance is true"),
    ([*FLUX, "model.autoencoder={folder}/odd.json"], "model.autoencoder: {folder}/odd.json is not a complete"),
    ([*FLUX, "model.preset=null", *CHECKPOINT[1:], "odd"], "model.checkpoint: no settings"),
    ([*CHECKPOINT, "bare"], "model.tokenizer: tokenizer.vocab_size is 270; it must be at most the model's 48"),
    ([*CHECKPOINT, "whole", "model.initialize=[vae2llm]"], "(training: model.initialize) names ['vae2llm']"),
    ([*CHECKPOINT, "headless"], "model.checkpoint: {folder}/headless does not fit the model. Tensors"),
    (["watch.every=1", "watch.prompts=['{long}']"], "watch.prompts: prompt 'zzzz"),
    (["watch.every=1", "watch.prompts_file={folder}/long.txt"], "watch.prompts_file: prompt 'zzzz"),
    (["watch.every=1", "watch.prompts_file={folder}/empty.txt"], "watch.prompts_file: {folder}/empty.txt holds no"),
    (["watch.every=1", "watch.detection={folder}/odd.json"], "watch.detection: {folder}/odd.json"),
    ([*LOOKS, "watch.max_tokens=600"], "watch.max_tokens is 600; it must be at most"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data of a run, files with mistakes, and models without weights of their own kind."""
    folder = tmp_path_factory.mktemp("mistakes")
    write_run_data(folder)
    write_run_settings(folder / "run.yaml", folder, folder / "out")
    entries = json.loads((folder / "detection.json").read_text())
    (folder / "real.json").write_text(json.dumps([{**entry, "label": 1} for entry in entries]))
    (folder / "odd.json").write_text('[{"image": "0.png"}]')
    (folder / "long.txt").write_text("z" * 600)
    (folder / "empty.txt").write_text("")
    (folder / "odd").mkdir()
    save_pretrained(tiny_model(class_head=False, align_head=False), folder / "bare")
    save_pretrained(tiny_model(vocab_size=280), folder / "whole")
    save_pretrained(tiny_model(vocab_size=280, class_head=False), folder / "headless")
    config = json.loads((folder / "headless" / "config.json").read_text())
    (folder / "headless" / "config.json").write_text(json.dumps(config | {"class_head": True}))
    return folder


def filled(texts, folder):
    """Texts with their names; a checkpoint's name is put to the folder before it."""
    text = "\n".join(texts).replace("model.checkpoint={folder}/\n", "model.checkpoint={folder}/")
    return text.replace("{folder}", str(folder)).replace("{long}", "z" * 600).split("\n")


@pytest.mark.parametrize(("overrides", "message"), SETTINGS + FILES)
def test_mistakes_end_a_run_and_a_dry_run(cli, folder, overrides, message):
    """Settings, and files that are there, are checked alike."""
    overrides, (message,) = filled(overrides, folder), filled([message], folder)
    for more in ((), ("--dry-run",)):
        code, out, err = cli("--config", folder / "run.yaml", *overrides, *more)
        assert (code, out) == (1, "")
        assert err.startswith("unigendet train: ")
        assert message in err
        assert err.count("\n") == 1
    assert not (folder / "out").exists()


@pytest.mark.parametrize(("overrides", "message"), SETTINGS)
def test_settings_are_checked_where_no_file_is(cli, folder, tmp_path, overrides, message):
    """As on a laptop: the dry run says the same without tokenizer and data."""
    gone = [f"model.tokenizer={tmp_path / 'none'}"]
    gone = [] if any(name in message for name in ("model.tokenizer", "both null")) else gone
    code, out, err = cli("--config", folder / "run.yaml", *gone, *filled(overrides, folder), "--dry-run")
    assert (code, out) == (1, "")
    assert filled([message], folder)[0] in err


def test_the_mesh_of_a_run_and_of_a_dry_run(cli):
    message = "parallel.shard is 2; it must be 1, so that parallel.replicate (1) times it is"
    for more in ((), ("--dry-run", "--world-size", 1)):
        code, out, err = cli("parallel.shard=2", *more)
        assert (code, out) == (1, "")
        assert message in err
    code, _, err = cli("parallel.cpu_offload=true", "--dry-run")
    assert code == 1
    assert "parallel.cpu_offload is True; it must be false on a CPU, and with one process" in err


def test_what_is_read_is_what_the_run_takes(folder):
    """Sources are read once, before the weights; nothing of the model is on a device."""
    looks = filled(LOOKS, folder)
    parts = prepare(load_train_config(folder / "run.yaml", [*looks, "watch.prompts=[a, b]"]))
    assert [len(source.records) for source in parts.sources] == [6, 6]
    assert parts.watched.prompts == ("a", "b")
    assert len(parts.watched.held_out) == 6
    assert all(parameter.is_meta for parameter in parts.model.parameters())


def test_a_dry_run_warns_of_all_that_is_not_there(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    lost = [f"model.tokenizer={tmp_path / 'words'}", "wandb.project=x", "watch.every=1", "watch.detection=held.json"]
    model, warnings = rehearse(load_train_config(folder / "run.yaml", [*lost, "watch.prompts=[fox]"]))
    assert names(warnings) == ["wandb.project", "model.tokenizer", "watch.detection"]
    assert model.vocab_size == 512, "the preset's"
    # held-out images that are not there, and an output that is another run's
    (tmp_path / "held.json").write_text((folder / "detection.json").read_text())
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-000001" / "training.json").write_text("{}")
    here = [f"output={tmp_path}", "watch.every=1", f"watch.detection={tmp_path / 'held.json'}"]
    _, warnings = rehearse(load_train_config(folder / "run.yaml", here))
    assert names(warnings) == ["output", "watch.detection"]
    assert "holds checkpoints of another run" in warnings[0]
    assert "6 of 6 images do not exist" in warnings[1]


def test_what_is_there_is_read_where_the_rest_is_not(cli, folder, tmp_path):
    """A malformed file ends a dry run on a machine that has neither tokenizer nor the other files."""
    odd, lost = folder / "odd.json", tmp_path / "lost.json"
    data = f"datasets.captions=[{{file: {lost}}}, {{file: {odd}}}]"
    code, out, err = cli(f"model.tokenizer={tmp_path / 'none'}", data, "--dry-run")
    assert (code, out) == (1, "")
    assert f"datasets.captions[1]: {odd}, entry 0" in err


def test_a_published_recipe_with_mistakes(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    recipe = default_config("diga_bagel7b.yaml")
    for override, message in (
        ("datasets.captions=[]", "datasets.captions is empty"),
        ("model.autoencoder=null", "model.autoencoder is None; it must be the file"),
        ("watch.size=[500, 512]", "watch.size is (500, 512)"),
    ):
        assert main(["train", "--config", str(recipe), "--dry-run", override]) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert message in captured.err


def test_a_checkpoint_without_a_tokenizer(cli, folder):
    overrides = filled([*CHECKPOINT, "whole", "model.tokenizer=null"], folder)
    message = f"model.checkpoint: tokenizer folder {folder / 'whole'} lacks ['vocab.json', 'merges.txt']"
    code, out, err = cli("--config", folder / "run.yaml", *overrides)
    assert (code, out) == (1, "")
    assert err.startswith(f"unigendet train: {message}")
    code, _, err = cli("--config", folder / "run.yaml", *overrides, "--dry-run")
    assert code == 0
    assert err.startswith(f"unigendet train: warning: {message}")
    file = f"model.checkpoint={folder / 'whole' / 'model.safetensors'}"
    code, _, err = cli("--config", folder / "run.yaml", *overrides, file)
    assert code == 1
    assert "model.safetensors'; it must be a folder, or model.tokenizer must be set: a file brings no tokenizer" in err


def test_data_check_names_the_tokenizer_s_setting(folder, tmp_path, capsys):
    for setting in ("model.tokenizer", "model.checkpoint"):
        overrides = ["model.tokenizer=null", "model.preset=null", f"{setting}={tmp_path / 'lost'}"]
        assert main(["data", "check", str(folder / "run.yaml"), *overrides]) == 1
        assert f"{setting} is '{tmp_path / 'lost'}'; there is no such folder" in capsys.readouterr().err


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
