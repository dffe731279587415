"""From annotation files and settings to checkpoints, as the command line runs it."""

import pytest
import torch
from run_data import write_run_data, write_run_settings

from unigendet.config_file import load_settings
from unigendet.data.tokenizer import load_tokenizer
from unigendet.model.checkpoint import load_pretrained
from unigendet.training.config import TrainConfig
from unigendet.training.metrics import TIMING
from unigendet.training.run import build_loader, build_model, train
from unigendet.training.state import checkpoints


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six images of 8×8 pixels, annotated for both tasks, and a tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    write_run_data(folder)
    return folder


@pytest.fixture
def configure(data, tmp_path):
    file = write_run_settings(tmp_path / "run.yaml", data, tmp_path / "gduf")

    def make(*overrides):
        return load_settings(TrainConfig, file, overrides)

    return make


def numbers(history):
    return [{name: value for name, value in row.items() if name not in TIMING} for row in history]


def test_gduf_then_diga_from_its_checkpoint(configure, tmp_path):
    gduf = train(configure(), quiet=True)
    assert [row["step"] for row in gduf.history] == [1, 2]
    assert {"mse", "ce", "label"} <= gduf.history[0].keys()
    # A checkpoint's model folder is complete: settings, weights, tokenizer.
    start = gduf.checkpoint / "ema"
    assert load_tokenizer(start).encode("picture") == load_tokenizer(gduf.checkpoint / "model").encode("picture")
    overrides = ("stage=diga", f"output={tmp_path / 'diga'}", "model.preset=null", "model.tokenizer=null")
    diga = train(configure(*overrides, f"model.checkpoint={start}"), quiet=True)
    assert {"mse", "diga"} <= diga.history[0].keys()
    before = load_pretrained(start)
    assert torch.equal(diga.model.lm_head.weight, before.lm_head.weight)
    assert not torch.equal(diga.model.align_head.fc1.weight, before.align_head.fc1.weight)


def test_resume_goes_on_where_the_data_were(configure, tmp_path):
    whole = train(configure("total_steps=4"), quiet=True)
    train(configure(f"output={tmp_path / 'parts'}", "optimizer.warmup_steps=0"), quiet=True)
    again = configure(f"output={tmp_path / 'parts'}", "total_steps=4", "optimizer.warmup_steps=0")
    resumed = train(again, resume=True, quiet=True)
    assert numbers(resumed.history) == numbers(whole.history)
    pairs = zip(resumed.model.parameters(), whole.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_wrong_paths_are_errors(configure, tmp_path):
    """docs/model.md §12.3: never random weights, never an empty start."""
    with pytest.raises(FileNotFoundError, match=r"model\.checkpoint is 'nowhere'; there is no such file or folder"):
        train(configure("model.preset=null", "model.checkpoint=nowhere"), quiet=True)
    with pytest.raises(FileNotFoundError, match="no checkpoint at nowhere"):
        train(configure(), resume="nowhere", quiet=True)
    with pytest.raises(FileNotFoundError, match="holds no checkpoints"):
        train(configure(), resume=True, quiet=True)
    with pytest.raises(FileNotFoundError, match=r"datasets\.detection\[0\]\.file is 'nowhere\.json'; there is no such"):
        train(configure("datasets.detection=[{file: nowhere.json}]"), quiet=True)


def test_settings_that_do_not_fit_are_errors(configure):
    with pytest.raises(ValueError, match=r"model\.checkpoint and model\.preset are both null"):
        train(configure("model.preset=null"), quiet=True)
    with pytest.raises(ValueError, match=r"model\.tokenizer is null"):
        train(configure("model.tokenizer=null"), quiet=True)
    with pytest.raises(ValueError, match="are empty; GDUF needs"):
        train(configure("datasets.detection=[]", "datasets.captions=[]"), quiet=True)
    with pytest.raises(ValueError, match="is empty; DIGA needs"):
        train(configure("stage=diga", "datasets.captions=[]"), quiet=True)


def test_second_run_does_not_mix_with_the_first(configure):
    train(configure("total_steps=1"), quiet=True)
    with pytest.raises(ValueError, match="holds checkpoints of another run"):
        train(configure("total_steps=1"), quiet=True)


def test_detection_can_leave_out_the_latent_image(configure):
    """The arm without symbiotic attention: detection only, no latent tokens at all."""
    only = ("datasets.captions=[]", "total_steps=1", "output=null")
    with_latents = train(configure(*only), quiet=True)
    without = train(configure(*only, "datasets.detection_latents=false"), quiet=True)
    assert with_latents.history[0].keys() == without.history[0].keys()
    assert with_latents.history[0]["tokens"] != without.history[0]["tokens"]
    assert without.checkpoint is None


def test_one_label_of_a_file(configure, data):
    """Real and fake images of one file as two sources with weights of their own."""
    file = data / "detection.json"
    config = configure(f"datasets.detection=[{{file: {file}, label: 1, weight: 9}}]", "datasets.captions=[]")
    tokenizer = load_tokenizer(data / "tokenizer")
    batch = next(iter(build_loader(config, build_model(config, tokenizer, "cpu"), tokenizer)))
    assert batch.labels.tolist() == [1] * len(batch.names)


def test_resuming_from_an_older_checkpoint_spares_the_later_ones(configure, tmp_path):
    """They would be taken for the newest ones, and the resumed run's own be removed as the oldest."""
    long = ("total_steps=6", "save_every=2", "optimizer.warmup_steps=0")
    train(configure(*long, "keep_checkpoints=3"), quiet=True)
    kept = checkpoints(tmp_path / "gduf")
    for old in (kept[0], str(kept[0])):
        with pytest.raises(
            ValueError, match=r"holds later checkpoints: step-000004, step-000006; it must be the newest"
        ):
            train(configure(*long, "keep_checkpoints=1"), resume=old, quiet=True)
    assert checkpoints(tmp_path / "gduf") == kept
    # Another folder that holds nothing takes the run from there, and one with another run's checkpoints does not.
    other = configure(*long, "keep_checkpoints=1", f"output={tmp_path / 'other'}")
    result = train(other, resume=kept[0], quiet=True)
    assert [row["step"] for row in result.history] == [3, 4, 5, 6]
    assert [path.name for path in checkpoints(tmp_path / "other")] == ["step-000006"]
    with pytest.raises(ValueError, match="holds checkpoints of another run"):
        train(other, resume=kept[-1], quiet=True)


@pytest.mark.parametrize("error", [AssertionError("Torch not compiled with CUDA enabled"), RuntimeError("none\nhere")])
def test_a_device_that_is_not_there(configure, monkeypatch, error):
    """A PyTorch without CUDA says so with an AssertionError."""

    def fail(*args, device):
        raise error

    monkeypatch.setattr(torch, "empty", fail)
    with pytest.raises(ValueError, match=r"device is 'cuda'; it must be 'auto' or a device of this machine \(.+\)$"):
        train(configure("device=cuda"), quiet=True)


def test_a_run_that_was_killed_while_it_wrote_its_metrics(configure, tmp_path):
    train(configure("optimizer.warmup_steps=0"), quiet=True)
    with (tmp_path / "gduf" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    again = configure("total_steps=4", "optimizer.warmup_steps=0")
    resumed = train(again, resume=True, quiet=True)
    assert [row["step"] for row in resumed.history] == [1, 2, 3, 4]
