"""Profiles of training steps: which steps they hold, how their files are called, and what is an error."""

import dataclasses
import gzip
import json
import re

import pytest
import torch
from training_fixtures import Batches, gduf_batch, tiny_model

from unigendet.training.config import ProfileConfig, TrainConfig
from unigendet.training.profiling import StepProfiler
from unigendet.training.stages import make_stage
from unigendet.training.trainer import Trainer, TrainingError

CONFIG = TrainConfig(total_steps=6)
CPU = torch.device("cpu")


def trainer(output, batches=None, **profile):
    config = dataclasses.replace(CONFIG, output=str(output), profile=ProfileConfig(**profile))
    return Trainer(make_stage(tiny_model(), config), batches or Batches(), config, quiet=True)


def files(output):
    return sorted(path.name for path in (output / "profile").iterdir()) if (output / "profile").exists() else []


def events(file):
    return json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]


def steps_in(file):
    """The steps that a trace has spans of, in time."""
    spans = {event["ts"]: event["name"] for event in events(file) if re.fullmatch(r"step \d+", str(event.get("name")))}
    return [int(spans[time].split()[1]) for time in sorted(spans)]


def test_the_wanted_steps(tmp_path):
    expected = trainer(tmp_path / "plain").run().history
    made = trainer(tmp_path, start=3, steps=2)
    history = made.run().history
    assert [row["loss"] for row in history] == [row["loss"] for row in expected]
    assert files(tmp_path) == ["step-000003.json.gz", "step-000003.txt"]
    assert files(tmp_path / "plain") == []
    trace = tmp_path / "profile" / "step-000003.json.gz"
    assert steps_in(trace) == [3, 4]
    names = {event.get("name") for event in events(trace)}
    assert {"aten::linear", "Optimizer.step#AdamW.step"} <= names
    table = (tmp_path / "profile" / "step-000003.txt").read_text()
    assert "Self CPU" in table
    assert "aten::" in table


def test_the_first_step_and_memory(tmp_path):
    trainer(tmp_path, start=1, steps=1, memory=True).run()
    assert files(tmp_path) == ["step-000001.json.gz", "step-000001.txt"]
    trace = tmp_path / "profile" / "step-000001.json.gz"
    assert steps_in(trace) == [1]
    assert any(event.get("name") == "[memory]" for event in events(trace))


def test_a_run_in_parts(tmp_path):
    """Each part profiles the wanted steps that it takes; one that ends beforehand leaves nothing."""
    made = trainer(tmp_path, start=3, steps=3)
    made.run(until=2)
    assert files(tmp_path) == []
    made.run(until=3)
    assert files(tmp_path) == ["step-000003.json.gz", "step-000003.txt"]
    made.run()
    assert files(tmp_path)[2:] == ["step-000004.json.gz", "step-000004.txt"]
    assert steps_in(tmp_path / "profile" / "step-000004.json.gz") == [4, 5]


def test_an_error_keeps_what_there_is(tmp_path):
    made = trainer(tmp_path, [gduf_batch(), gduf_batch()], start=2, steps=4)
    with pytest.raises(TrainingError, match="ended after step 2"):
        made.run()
    assert 2 in steps_in(tmp_path / "profile" / "step-000002.json.gz")


def test_processes_have_names_of_their_own(tmp_path):
    for rank in range(2):
        profiler = StepProfiler(ProfileConfig(start=7, steps=1), tmp_path, CPU, rank, 2)
        for step in (6, 7, 8):
            profiler.begin(step)
            torch.ones(2).sum()
            profiler.end(step)
        profiler.close()
    expected = [f"step-000007-rank-{rank}.{kind}" for rank in range(2) for kind in ("json.gz", "txt")]
    assert files(tmp_path) == expected


def test_a_file_that_cannot_be_written(tmp_path):
    (tmp_path / "profile").write_text("in the way")
    with pytest.raises(OSError, match=r"cannot write .*profile.* after|after step 2: cannot write .*profile"):
        trainer(tmp_path, start=2, steps=1).run()


def test_settings():
    with pytest.raises(ValueError, match=r"profile\.start is 7; it must be ≤ total_steps \(6\)"):
        dataclasses.replace(CONFIG, output="x", profile=ProfileConfig(start=7))
    with pytest.raises(ValueError, match=r"output is None; it must be a folder for profile\.start to write to"):
        dataclasses.replace(CONFIG, profile=ProfileConfig(start=1))
    with pytest.raises(ValueError, match=r"profile\.start is 0; it must be positive, or null"):
        ProfileConfig(start=0)
    with pytest.raises(ValueError, match=r"profile\.steps is 0; it must be positive"):
        ProfileConfig(start=1, steps=0)
