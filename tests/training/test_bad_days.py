"""What a user is told on a bad day: one line that names the thing and the remedy, and nothing good is lost."""

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from run_process import history, run, write_run
from safetensors.torch import load_file, save_file

from unigendet.cli import main
from unigendet.data.tokenizer import Tokenizer
from unigendet.model.checkpoint import load_pretrained
from unigendet.training.metrics import MetricsWriter
from unigendet.training.state import checkpoints


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps, with its settings."""
    folder = tmp_path_factory.mktemp("trained")
    file = write_run(folder, total_steps=2, save_every=1)
    assert main(["train", "--config", str(file)]) == 0
    return file, folder / "out"


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of the run to damage; (settings file, the setting of its output, newest checkpoint)."""
    file, output = trained
    shutil.copytree(output, tmp_path / "out")
    return file, f"output={tmp_path / 'out'}", checkpoints(tmp_path / "out")[-1]


@pytest.fixture
def command(capsys):
    """Runs the command line; returns (exit code, the one line of standard error)."""

    def call(*arguments):
        capsys.readouterr()
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as end:
            code = end.code
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        return code, lines[0]

    return call


# A full disk


@pytest.mark.slow
def test_a_disk_that_is_full(trained, tmp_path):
    """For real: the kernel refuses to let a file grow (which for a process without root comes nearest to it)."""
    file, output = trained
    shutil.copytree(output, tmp_path / "out")
    setting = f"output={tmp_path / 'out'}"
    before = {p: p.read_bytes() for p in (tmp_path / "out" / "checkpoints").rglob("*") if p.is_file()}
    code, err = run("train", "--config", file, setting, "total_steps=4", "--resume", wrapped=["limit:500000"])
    last = err.splitlines()[-1]
    assert code == 1
    assert "Traceback" not in err
    assert last.startswith("unigendet train: after step 3: cannot write ")
    assert ".step-000003.partial/model/model.safetensors (File too large)" in last
    good = tmp_path / "out" / "checkpoints" / "step-000002"
    assert f"the last good checkpoint is {good}: make room, then resume the run (--resume)" in last
    assert {p: p.read_bytes() for p in (tmp_path / "out" / "checkpoints").rglob("*") if p.is_file()} == before
    code, err = run("train", "--config", file, setting, "total_steps=4", "--resume")
    assert code == 0, err
    assert [row["step"] for row in history(tmp_path / "out")] == [1, 2, 3, 4]


def no_space(*args, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_space_in_rust(*args, **options):
    raise Exception("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("function", [no_space, no_space_in_rust])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_no_space_left_for_any_file_of_a_checkpoint(copied, command, monkeypatch, function, at):
    file, setting, good = copied
    inner, calls = save_file, []

    def save(*args, **options):
        calls.append(args)
        return function() if len(calls) == at else inner(*args, **options)

    monkeypatch.setattr("safetensors.torch.save_file", save)
    monkeypatch.setattr("unigendet.training.metrics.ProgressDisplay.log", lambda *_: None)
    code, line = command("train", "--config", file, setting, "total_steps=4", "--resume")
    name = ["model/model", "ema/model", "optimizer"][at - 1]
    assert code == 1
    assert f"cannot write {good.parent / '.step-000003.partial' / name}.safetensors (No space left on device)" in line
    assert f"the last good checkpoint is {good}: make room, then resume" in line
    assert sorted(p.name for p in good.parent.iterdir()) == ["step-000001", "step-000002"]
    load_pretrained(good / "model")


@pytest.mark.parametrize(
    "name", ["model/config.json", "ema/config.json", "model/data.json", "ema/data.json", "training.json",
             "model/tokenizer.json"]
)  # fmt: skip
def test_no_space_left_for_the_small_files(copied, command, monkeypatch, name):
    """Each of them, by whatever means it is written."""
    file, setting, good = copied
    partial, before = good.parent / ".step-000003.partial", tree(good)
    inner, save = Path.write_text, Tokenizer.save

    def write_text(path, *args, **options):
        return no_space() if path == partial / name else inner(path, *args, **options)

    def save_tokenizer(tokenizer, folder):
        if folder / "tokenizer.json" == partial / name:
            tokenizer._backend = SimpleNamespace(save=no_space_in_rust)
        save(tokenizer, folder)

    monkeypatch.setattr(Path, "write_text", write_text)
    monkeypatch.setattr(Tokenizer, "save", save_tokenizer)
    monkeypatch.setattr("unigendet.training.metrics.ProgressDisplay.log", lambda *_: None)
    code, line = command("train", "--config", file, setting, "total_steps=4", "--resume")
    assert code == 1
    assert line == (
        f"unigendet train: after step 3: cannot write {partial / name} (No space left on device); "
        f"the last good checkpoint is {good}: make room, then resume the run (--resume)"
    )
    assert sorted(p.name for p in good.parent.iterdir()) == ["step-000001", "step-000002"]
    assert tree(good) == before


def tree(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_no_space_left_in_a_new_output_of_a_resumed_run(trained, command, monkeypatch, tmp_path):
    """Which has no checkpoint of its own yet: starting again would throw away what it goes on from."""
    file, output = trained
    good = checkpoints(output)[-1]
    monkeypatch.setattr("safetensors.torch.save_file", no_space)
    monkeypatch.setattr("unigendet.training.metrics.ProgressDisplay.log", lambda *_: None)
    base = ["train", "--config", file, f"output={tmp_path / 'new'}", "total_steps=4"]
    code, line = command(*base, "--resume", good)
    assert code == 1
    assert line.endswith(
        f"no checkpoint has been written yet: make room, then go on again from {good} (--resume {good})"
    )
    code, line = command(*base)
    assert code == 1
    assert line.endswith("has been written yet: make room, then start the run again")


@pytest.mark.parametrize("method", ["add", "flush", "sync", "close"])
def test_no_space_left_for_the_metrics(copied, command, monkeypatch, method):
    file, setting, good = copied
    monkeypatch.setattr("unigendet.training.metrics.ProgressDisplay.log", lambda *_: None)
    inner = getattr(MetricsWriter, method)

    def full(self, *args):
        inner(self, *args)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))

    monkeypatch.setattr(MetricsWriter, method, full)
    code, line = command("train", "--config", file, setting, "total_steps=3", "--resume")
    assert code == 1
    assert f"cannot write {good.parents[1] / 'metrics.jsonl'} (No space left on device); the last good" in line


@pytest.mark.slow
def test_the_metric_file_is_full(trained, tmp_path):
    """For real, and nothing of the file's history is lost by it."""
    file, output = trained
    shutil.copytree(output, tmp_path / "out")
    metrics = tmp_path / "out" / "metrics.jsonl"
    room = 2 * (tmp_path / "out" / "run.json").stat().st_size + 600  # for its next entry, and for part of the rows
    setting = [f"output={tmp_path / 'out'}", "save_every=0", "total_steps=200", "log_every=200"]
    code, err = run("train", "--config", file, *setting, "--resume", wrapped=[f"limit:{room}"])
    assert code == 1
    assert "Traceback" not in err
    assert "metrics.jsonl (File too large); the last good checkpoint is" in err.splitlines()[-1]
    assert [row["step"] for row in history_until_damage(metrics)][:2] == [1, 2]


def history_until_damage(file):
    rows = []
    for line in file.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def test_a_resumed_run_keeps_its_history_at_every_instant(copied, command, monkeypatch):
    """Killed while it wrote the metric file anew, it had lost it: now the old file stands until the new one does."""
    file, setting, good = copied
    before = history(good.parents[1])
    monkeypatch.setattr(os, "replace", no_space)
    code, line = command("train", "--config", file, setting, "total_steps=3", "--resume")
    assert code == 1
    assert "No space left" in line
    assert history(good.parents[1]) == before


def test_a_run_finishes_the_interrupted_save_that_it_starts_from(copied, tmp_path):
    """Before it reads the first file of it, the tokenizer's."""
    file, _, good = copied
    model = good / "model"
    (model / ".files.partial").mkdir()
    for name in ("tokenizer.json", "model.safetensors"):
        (model / name).rename(model / ".files.partial" / name)
    (model / ".replacing").write_text("")
    base = ["train", "--config", str(file), f"output={tmp_path / 'new'}", "total_steps=1"]
    assert main([*base, "model.preset=null", "model.tokenizer=null", f"model.checkpoint={model}"]) == 0
    assert not list(model.glob(".*"))


# A checkpoint that does not fit


def rewrite(file, **changes):
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | changes))


def test_a_checkpoint_of_another_size(copied, command):
    file, setting, good = copied
    rewrite(good / "model" / "config.json", hidden_size=64)
    code, line = command("train", "--config", file, setting, "--resume")
    assert code == 1
    assert line.startswith(f"unigendet train: resume: {good / 'model'} does not fit the model. Tensors ")
    assert "of another shape: " in line
    assert " more. The weights must be those of a model with the settings beside them" in line
    assert len(line) < 3000
    code, line = command("detect", "--model", good / "model", ".")
    assert code == 1
    rewrite(good / "model" / "config.json", hidden_size=128)
    save = load_file(good / "optimizer.safetensors") | {"vae2llm.weight.exp_avg": torch.zeros(3)}
    save_file(save, good / "optimizer.safetensors")
    code, line = command("train", "--config", file, setting, "--resume")
    assert code == 1
    assert "optimizer state of vae2llm.weight has shapes {'exp_avg': [3]}; the parameter is [128, 4]" in line


@pytest.mark.parametrize(
    "name", ["model/model.safetensors", "ema/model.safetensors", "optimizer.safetensors", "training.json",
             "model/config.json", "model/tokenizer.json"]
)  # fmt: skip
def test_a_truncated_or_missing_file(copied, command, name):
    file, setting, good = copied
    (good / name).write_bytes((good / name).read_bytes()[:-20])
    needed = name != "model/tokenizer.json"  # a run has its own
    base = ["train", "--config", file, setting, "--resume"]
    if needed:
        code, line = command(*base)
        assert code == 1
        assert str(good / name) in line
    (good / name).unlink()
    if needed:
        code, line = command(*base)
        assert code == 1
        assert name.rpartition("/")[2] in line
        assert str(good) in line
    if name.startswith("model/"):
        code, line = command("detect", "--model", good / "model", ".")
        assert code == 1
        assert str(good / "model") in line or "no images in" in line


def test_a_checkpoint_of_the_other_stage(copied, command):
    file, setting, good = copied
    code, line = command("train", "--config", file, setting, "stage=diga", "--resume")
    assert code == 1
    assert "is another run's: saved by {'stage': 'gduf'}, this is {'stage': 'diga'" in line
    assert f"or start this run from its weights (model.checkpoint={good / 'model'} model.preset=null)" in line


@pytest.mark.parametrize("name", ["max_tokens", "lookahead", "seed"])
def test_a_position_of_other_loader_settings(copied, command, tmp_path, name):
    """It is refused, and either thing that the message says goes on."""
    file, setting, good = copied
    own = json.loads(file.read_text()).get("loader", {}).get(name, 0)
    changed, base = f"loader.{name}={own + 1}", ["train", "--config", file, "total_steps=3"]
    code, line = command(*base, setting, changed, "--resume")
    assert code == 1
    assert line == (
        f"unigendet train: checkpoint {good}: the saved position does not fit this loader: loader.{name} is {own + 1}, "
        f"saved with {own}; put back what has changed, or begin a new run from its weights "
        f"(model.checkpoint={good / 'model'} model.preset=null, another output)"
    )
    new = [f"output={tmp_path / 'new'}", *line.rpartition("(")[2].partition(",")[0].split()]
    assert main([str(a) for a in [*base, *new, changed]]) == 0
    assert main([str(a) for a in [*base, setting, "--resume"]]) == 0


def test_a_run_that_is_finished(copied, caplog):
    file, setting, good = copied
    base = ["train", "--config", str(file), setting]
    assert main([*base, "--resume"]) == 0
    (said,) = (record.getMessage() for record in caplog.records)
    assert said == (
        f"checkpoint {good} is of step 2, the last of the run: nothing is left to train; with a larger total_steps it "
        "goes on, by the schedules of that many steps"
    )
    caplog.clear()
    assert main([*base, "total_steps=3", "--resume"]) == 0
    assert checkpoints(good.parents[1])[-1].name == "step-000003"
    assert not caplog.records


def test_a_training_checkpoint_in_place_of_its_model(copied, command, tmp_path):
    file, _, good = copied
    for arguments in (["detect", "--model", good, "."], ["train", "--config", file, "model.preset=null",
                      f"model.checkpoint={good}", f"output={tmp_path / 'new'}"]):  # fmt: skip
        code, line = command(*arguments)
        assert code == 1
        assert f"it looks like a training checkpoint: name {good / 'ema'}" in line


def test_unknown_settings_and_options(trained, command, tmp_path):
    file, _ = trained
    for setting in ("total_stops=3", "optimizer.learning_rate=1"):
        code, line = command("train", "--config", file, setting)
        assert code == 1
        assert setting.partition("=")[0] in line
        assert "unigendet train: settings of" in line
    (tmp_path / "odd.yaml").write_text(json.dumps(json.loads(file.read_text()) | {"optimiser": {"lr": 1}}))
    code, line = command("train", "--config", tmp_path / "odd.yaml")
    assert code == 1
    assert "optimiser" in line
    code, line = command("train", "--config", file, "--speed=9")
    assert code == 2
    assert line == "unigendet train: unrecognized arguments: --speed=9; see unigendet train --help"
    code, line = command("fly")
    assert code == 2
    assert "invalid choice: 'fly'" in line


def test_a_damaged_loader_position(copied, command):
    file, setting, good = copied
    for position in ({}, {"identity": 3}, {"identity": {}, "positions": []}):
        rewrite(good / "training.json", position=position)
        code, line = command("train", "--config", file, setting, "total_steps=3", "--resume")
        assert code == 1
        assert "position" in line
