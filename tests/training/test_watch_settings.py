"""The settings of looks at a run: mistakes show before anything is loaded, and are named."""

import functools
import json

import pytest
from PIL import Image
from training_fixtures import tiny_model
from watched_run import make_trainer, write_settings

from unigendet.cli import main
from unigendet.config_file import load_settings
from unigendet.data.tokenizer import load_tokenizer
from unigendet.model.autoencoder import build_autoencoder
from unigendet.training import run as run_module
from unigendet.training.config import TrainConfig
from unigendet.training.run import prepare_watcher


@pytest.fixture
def run_file(watched_data, tmp_path):
    return write_settings(watched_data, tmp_path)


@pytest.fixture
def cli(run_file, tmp_path, capsys, monkeypatch):
    """Run ``unigendet train`` where no weights may be loaded; the message."""

    def load(*arguments):
        raise AssertionError("weights were loaded before everything else was checked")

    monkeypatch.setattr(run_module, "build_model", load)

    def run(*overrides):
        assert main(["train", "--config", str(run_file), *overrides]) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("unigendet train: ")
        assert "Traceback" not in captured.err
        return captured.err

    return run


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["watch.every=-1"], "watch.every is -1; it must be at least 0"),
        (["watch.evry=1"], "watch.evry"),
        (["watch.every=often"], "watch.every"),
        (["watch.count=0"], "watch.count is 0; it must be positive"),
        (["watch.limit=0"], "watch.limit is 0; it must be positive"),
        (["watch.batch_size=0"], "watch.batch_size is 0; it must be positive"),
        (["watch.max_tokens=-1"], "watch.max_tokens is -1; it must be at least 0"),
        (["watch.seed=-1"], "watch.seed is -1; it must be at least 0"),
        (["watch.size=[0, 8]"], "watch.size is (0, 8); it must be (height, width) in pixels"),
        (["watch.guidance.num_timesteps=1"], "guidance.num_timesteps is 1; it must be at least 2"),
        (["watch.prompts=['a', ' ']"], "watch.prompts is ('a', ' '); it must be texts that are not empty"),
        (["watch.prompts=a fox"], "watch.prompts"),
        (["watch.prompts_file=p.txt"], "watch.prompts_file is 'p.txt'; it must be null with watch.prompts"),
        (["watch.prompts=[]", "watch.prompts_file=lost"], "watch.prompts_file is 'lost'; there is no such file"),
        (
            ["watch.prompts=[]", "watch.prompts_file={folder}/empty.txt"],
            "watch.prompts_file: {folder}/empty.txt holds no prompt",
        ),
        (
            ["watch.prompts=[]", "watch.prompts_file={folder}/odd.txt"],
            "watch.prompts_file: {folder}/odd.txt, line 1 is not UTF-8",
        ),
        (
            ["watch.prompts=[]", "watch.prompts_file={folder}/seed.json"],
            "entry 0 is 'a'; it must be a prompt without seed",
        ),
        (["watch.detection=lost.json"], "watch.detection is 'lost.json'; there is no such file or folder"),
        (["watch.detection={folder}"], "watch.detection: folder {folder} holds"),
        (["watch.detection={folder}/empty.txt"], "watch.detection: annotation file"),
        (["watch.detection={folder}/label.json"], "watch.detection: {folder}/label.json, entry 0, field 'label' is 2"),
        (["watch.image_root={folder}"], "4 of 4 images do not exist, the first is {folder}/0.png"),
        (["watch.detection=null", "watch.image_root=x"], "watch.image_root is 'x'; it must be null without"),
        (["watch.prompts=[]", "watch.detection=null"], "watch.every is 2; it must be 0 without watch.prompts"),
        (["output=null"], "output is None; it must be a folder for watch.every to write to"),
    ],
)
def test_mistakes_show_before_anything_is_loaded(cli, watched_data, tmp_path, overrides, message):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "seed.json").write_text('[{"prompt": "a", "seed": 3}]')
    (tmp_path / "odd.txt").write_bytes(b"\xff\xfe\xff")
    entries = json.loads((watched_data / "detection.json").read_text())
    (tmp_path / "label.json").write_text(json.dumps([{**entries[0], "label": 2}]))
    assert message.format(folder=tmp_path) in cli(*(o.format(folder=tmp_path) for o in overrides))
    assert not (tmp_path / "out").exists()


def test_prompts_come_from_a_file_too(run_file, tmp_path):
    (tmp_path / "prompts.txt").write_text("# birds and others\na fox\n\n  a heron, at dawn \n")
    overrides = ["watch.prompts=[]", f"watch.prompts_file={tmp_path / 'prompts.txt'}", "total_steps=1"]
    assert main(["train", "--config", str(run_file), *overrides]) == 0
    assert Image.open(tmp_path / "out" / "watch" / "step-000001.png").size == (3 * 72 - 8, 2 * 72 - 8)


def test_settings_that_do_not_suit_the_model(run_file, watched_data):
    make = functools.partial(make_trainer, watched_data, run_file)
    with pytest.raises(ValueError, match=r"watch\.size is \(7, 8\); it must be .* multiples of 2 pixels"):
        make("watch.size=[7, 8]")
    config = load_settings(TrainConfig, run_file)
    model = tiny_model(vocab_size=280, class_head=False)
    watcher, tokenizer = prepare_watcher(config), load_tokenizer(watched_data / "tokenizer")
    with pytest.raises(ValueError, match=r"watch\.max_tokens is 0; it must be positive: the model has no real/fake"):
        watcher(model, tokenizer, build_autoencoder(model.config.latent))
