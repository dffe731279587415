import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_fixtures import Batches, diga_batch, gduf_batch, tiny_config, tiny_model

from unigendet.model.checkpoint import CheckpointError, load_pretrained
from unigendet.training.config import OptimizerConfig, TrainConfig
from unigendet.training.metrics import TIMING
from unigendet.training.stages import make_stage
from unigendet.training.state import checkpoints
from unigendet.training.trainer import Trainer

CONFIG = TrainConfig(total_steps=6, align_layer=2, teacher_layer=3, optimizer=OptimizerConfig(lr=1e-2, eps=1e-8))
MAKE = {"gduf": gduf_batch, "diga": diga_batch}


def trainer(model=None, batches=None, **settings):
    config = dataclasses.replace(CONFIG, **settings)
    batches = Batches(MAKE[config.stage]) if batches is None else batches
    return Trainer(make_stage(model or tiny_model(), config), batches, config, quiet=True)


@pytest.fixture
def saved(tmp_path):
    """The checkpoint of a GDUF run at step 2."""
    return trainer(output=str(tmp_path / "run")).run(until=2).checkpoint


def comparable(made):
    history = [{name: value for name, value in row.items() if name not in TIMING} for row in made.history]
    tensors = [*made.stage.model.parameters(), *made.ema.tensors, *made.stage.state_dict().values()]
    return history, [t.detach().clone() for t in tensors]


@pytest.mark.parametrize("stage", ["gduf", "diga"])
def test_resumed_run_is_the_run(stage, tmp_path):
    """Six steps at once, or three, a checkpoint, a new process's objects and three more: bit for bit the same."""
    output = str(tmp_path / "run")
    whole = trainer(stage=stage)
    whole.run()
    first = trainer(stage=stage, output=output)
    path = first.run(until=3).checkpoint
    teacher = {name: t.clone() for name, t in first.stage.state_dict().items()}
    first.run(until=4)  # work that is lost: its metrics must not appear twice
    second = trainer(load_pretrained(path / "model"), stage=stage, output=output)
    second.resume(path)
    assert second.state.step == 3
    assert all(torch.equal(t, teacher[name]) for name, t in second.stage.state_dict().items())
    second.run()
    history, tensors = comparable(second)
    expected_history, expected = comparable(whole)
    assert history == expected_history
    assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_checkpoint_loads_as_a_model(tmp_path):
    made = trainer(output=str(tmp_path), total_steps=2)
    path = made.run().checkpoint
    model, average = load_pretrained(path / "model"), load_pretrained(path / "ema")
    live = dict(made.stage.model.named_parameters())
    assert model.config == tiny_config()
    assert all(torch.equal(p, live[name]) for name, p in model.named_parameters())
    assert not torch.equal(average.vae2llm.weight, model.vae2llm.weight)
    with made.ema.applied():
        assert all(torch.equal(p, live[name]) for name, p in average.named_parameters())


def test_checkpoints_come_and_go(tmp_path):
    made = trainer(output=str(tmp_path), save_every=1, keep_checkpoints=2)
    result = made.run(until=5)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000004", "step-000005"]
    assert result.checkpoint == checkpoints(tmp_path)[-1]
    assert trainer().run(until=1).checkpoint is None


def test_interrupted_save_leaves_the_old_checkpoint(saved, monkeypatch):
    """A checkpoint is there whole or not at all."""
    made = trainer(output=str(saved.parents[1]))
    made.resume(saved)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        made.run(until=3)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    assert checkpoints(saved.parents[1]) == [saved]
    trainer().resume(saved)


@pytest.mark.parametrize("part", ["model", "ema", "optimizer.safetensors", "training.json"])
def test_missing_part_is_an_error(saved, part):
    target = saved / part
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    with pytest.raises(FileNotFoundError, match=f"incomplete for this run: it has no {part}"):
        trainer().resume(saved)


def test_missing_teacher_is_an_error(tmp_path):
    path = trainer(stage="diga", output=str(tmp_path)).run(until=1).checkpoint
    (path / "stage.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no stage\.safetensors"):
        trainer(stage="diga").resume(path)


@pytest.mark.parametrize("change", ["drop", "reshape", "add"])
def test_a_teacher_that_does_not_fit_is_an_error(tmp_path, change):
    path = trainer(stage="diga", output=str(tmp_path)).run(until=1).checkpoint
    state = load_file(path / "stage.safetensors")
    bias = state.pop("vae2llm.bias")
    state |= {"drop": {}, "reshape": {"vae2llm.bias": bias[1:]}, "add": {"vae2llm.bias": bias, "other": bias + 1}}[
        change
    ]
    save_file(state, path / "stage.safetensors")
    with pytest.raises(CheckpointError, match=r"stage diga has missing, .*: (vae2llm\.bias|other)$"):
        trainer(stage="diga").resume(path)


def test_missing_checkpoint_is_an_error(tmp_path):
    """docs/model.md §12.3: a misspelt path does not start afresh."""
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*step-9: there is no such folder"):
        trainer().resume(tmp_path / "step-9")


def test_other_run_is_an_error(saved, tmp_path):
    with pytest.raises(CheckpointError, match=r"another run's.*'gduf'.*'diga'"):
        trainer(stage="diga").resume(saved)
    path = trainer(stage="diga", output=str(tmp_path / "diga")).run(until=1).checkpoint
    with pytest.raises(CheckpointError, match=r"another run's.*'teacher_layer': 3.*'teacher_layer': 1"):
        trainer(stage="diga", teacher_layer=1).resume(path)


@pytest.mark.parametrize("change", ["drop", "reshape"])
def test_optimizer_state_that_does_not_fit_is_an_error(saved, change):
    """docs/model.md §12.3: a failing optimizer load does not start afresh."""
    record, state = json.loads((saved / "training.json").read_text()), load_file(saved / "optimizer.safetensors")
    if change == "drop":
        record["trained"].remove("vae2llm.weight")
        state = {name: t for name, t in state.items() if not name.startswith("vae2llm.weight.")}
    else:
        state["vae2llm.weight.exp_avg"] = torch.zeros(3)
    (saved / "training.json").write_text(json.dumps(record))
    save_file(state, saved / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match=r"optimizer state.*vae2llm\.weight"):
        trainer().resume(saved)


def test_loader_position_is_needed_or_refused(saved, tmp_path):
    with pytest.raises(CheckpointError, match="a loader position, but the batches cannot take one"):
        trainer(batches=[gduf_batch()] * 6).resume(saved)
    path = trainer(batches=[gduf_batch()] * 6, output=str(tmp_path / "list")).run(until=1).checkpoint
    with pytest.raises(CheckpointError, match="no loader position, but the batches need one"):
        trainer().resume(path)


def test_run_that_is_over_is_an_error(saved):
    with pytest.raises(CheckpointError, match="is at step 2; total_steps is 1"):
        trainer(total_steps=1).resume(saved)


@pytest.mark.parametrize("kept", [0, 100, -10])
def test_damaged_optimizer_is_named(saved, kept):
    file = saved / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is not a complete safetensors file"):
        trainer().resume(saved)


def test_everything_is_safetensors_or_json(tmp_path):
    """Whoever is handed a checkpoint can open it without running anybody's code."""
    path = trainer(stage="diga", output=str(tmp_path)).run(until=1).checkpoint
    files = [file for file in path.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".safetensors", ".json"}
    for file in files:
        load_file(file) if file.suffix == ".safetensors" else json.loads(file.read_text())


@pytest.mark.parametrize(("generator", "match"), [("0g", "generators are not"), ("00" * 16, "on the kind of device")])
def test_random_state_of_another_kind_is_an_error(saved, generator, match):
    record = json.loads((saved / "training.json").read_text()) | {"generators": [generator]}
    (saved / "training.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=rf"training\.json.*{match}"):
        trainer().resume(saved)


@pytest.mark.parametrize("content", ["", '{"step": 2, "ident', "[]", "{}", '{"identity": {}, "step": "2"}', "\0"])
def test_damaged_settings_are_named(saved, content):
    (saved / "training.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"training\.json (is|holds|has)"):
        trainer().resume(saved)


def test_damaged_teacher_is_named(tmp_path):
    path = trainer(stage="diga", output=str(tmp_path)).run(until=1).checkpoint
    file = path / "stage.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"stage\.safetensors is not a complete safetensors file"):
        trainer(stage="diga").resume(path)
