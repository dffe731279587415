"""``run.json``: what a run was, start by start."""

import dataclasses
import json
import socket
import sys
from datetime import datetime

import pytest
import torch
from training_fixtures import Batches, tiny_model

from unigendet.environment import environment
from unigendet.training import record
from unigendet.training.config import OptimizerConfig, TrainConfig
from unigendet.training.stages import make_stage
from unigendet.training.trainer import SaveError, Trainer

CONFIG = TrainConfig(total_steps=3, optimizer=OptimizerConfig(betas=(0.8, 0.9)))


def trainer(output, **settings):
    config = dataclasses.replace(CONFIG, output=str(output), **settings)
    return Trainer(make_stage(tiny_model(), config), Batches(), config, quiet=True)


def starts(output):
    text = (output / "run.json").read_text(encoding="utf-8")
    found = json.loads(text)
    assert found.keys() == {"starts"}
    return found["starts"]


def test_every_start_has_an_entry(tmp_path):
    trainer(tmp_path).run(until=2)
    (first,) = starts(tmp_path)
    assert datetime.fromisoformat(first.pop("time")).utcoffset().total_seconds() == 0
    assert len(first["devices"]) == first["world_size"] == 1
    about = {
        "hostname": socket.gethostname(),
        "command": sys.orig_argv,
        "step": 0,
        "resumed_from": None,
        "cuda": torch.version.cuda,
        **environment(),
    }
    assert {name: first[name] for name in about} == about
    assert first["settings"] == json.loads(json.dumps(dataclasses.asdict(trainer(tmp_path).config)))
    assert first["settings"]["optimizer"]["betas"] == [0.8, 0.9]

    again = trainer(tmp_path, log_every=7)
    again.resume(tmp_path / "checkpoints" / "step-000002")
    again.run()
    before, after = starts(tmp_path)
    assert {name: value for name, value in before.items() if name != "time"} == first
    assert (after["step"], after["resumed_from"]) == (2, str(tmp_path / "checkpoints" / "step-000002"))
    assert after["settings"]["log_every"] == 7


def test_processes_and_the_driver(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(record, "driver_version", lambda: "580.1")
    record.record_start(dataclasses.replace(CONFIG, output=str(tmp_path / "new" / "run")), ["a GPU", "another"], step=5)
    (entry,) = starts(tmp_path / "new" / "run")
    assert (entry["world_size"], entry["devices"]) == (2, ["a GPU", "another"])
    assert (entry["driver"], entry["step"]) == ("580.1", 5)


def test_nothing_without_an_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record.record_start(CONFIG, ["a CPU"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ['{"starts": [', "[]", "{}", '{"starts": 3}'])
def test_a_damaged_record_is_an_error(tmp_path, content):
    """Nothing is trained, and nothing of it is lost."""
    (tmp_path / "run.json").write_text(content)
    made = trainer(tmp_path)
    with pytest.raises(ValueError, match=r"run\.json is damaged .*; it must be a record of a run's starts"):
        made.run()
    assert made.state.step == 0
    assert (tmp_path / "run.json").read_text() == content


def test_a_record_that_cannot_be_written(tmp_path):
    (tmp_path / "run.json").mkdir()
    with pytest.raises(SaveError, match=r"after step 0: cannot write .*run\.json.*start the run again"):
        trainer(tmp_path).run()
