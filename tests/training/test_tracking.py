"""Weights & Biases, spoken to through a stand-in of the library that writes down how it is called."""

import dataclasses
import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from training_fixtures import Batches, gduf_batch, tiny_model

from unigendet.training import run
from unigendet.training.config import ModelSource, TrainConfig, WandbConfig, load_train_config
from unigendet.training.metrics import SUMS, Look, mean_row
from unigendet.training.stages import make_stage
from unigendet.training.trainer import Trainer, TrainingError

WANDB = WandbConfig(project="detectors", name="first", entity="a team", mode="offline", tags=("tiny", "test"))
CONFIG = TrainConfig(total_steps=4, log_every=2)
PIXELS = np.zeros((8, 8, 4), np.uint8)


class Library(ModuleType):
    """``wandb`` as far as it is called: ``calls`` has every call of a run's, in order."""

    class Error(Exception):
        pass

    def __init__(self):
        super().__init__("wandb")
        self.calls, self.refusal = [], None

    def init(self, **arguments):
        if self.refusal:
            raise self.Error(self.refusal)
        self.calls.append(("init", arguments))
        return SimpleNamespace(
            define_metric=lambda name, step_metric: self.calls.append(("define", (name, step_metric))),
            log=lambda values: self.calls.append(("log", values)),
            finish=lambda exit_code: self.calls.append(("finish", exit_code)),
        )

    def Image(self, pixels):
        return "picture", pixels.shape


@pytest.fixture
def library(monkeypatch):
    stand_in = Library()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    return stand_in


def trainer(output, batches=None, watch=None, **settings):
    config = dataclasses.replace(CONFIG, **{"output": str(output), "wandb": WANDB} | settings)
    return Trainer(make_stage(tiny_model(), config), batches or Batches(), config, watch=watch, quiet=True)


def called(library, what):
    return [arguments for name, arguments in library.calls if name == what]


def test_what_a_run_sends(library, tmp_path):
    """The settings; the means that TensorBoard gets, under its names; what the looks saw; and the end."""

    def watch(state, ends):
        return Look(state.step, {"accuracy": 0.75}, PIXELS, "") if state.step == 4 else None

    made = trainer(tmp_path, watch=watch)
    history = made.run().history
    (arguments,) = called(library, "init")
    settings = arguments.pop("config")
    assert settings == json.loads(json.dumps(dataclasses.asdict(made.config)))
    assert settings["wandb"]["tags"] == ["tiny", "test"]
    assert arguments == {
        "project": "detectors",
        "name": "first",
        "entity": "a team",
        "mode": "offline",
        "tags": ["tiny", "test"],
        "dir": str(tmp_path),
        "id": (tmp_path / "wandb-id.txt").read_text().strip(),
        "resume": None,
        "allow_val_change": True,
    }
    assert [name for name, _ in library.calls] == ["init", "define", "log", "log", "log", "log", "finish"]
    assert called(library, "define") == [("*", "step")]
    means = [mean_row(history[:2]), mean_row(history[2:])]
    scalars = [{name: value for name, value in mean.items() if name not in ("step", *SUMS)} for mean in means]
    expected = [{f"train/{name}": value for name, value in mean.items()} for mean in scalars]
    expected = [values | {"step": step} for values, step in zip(expected, (2, 4), strict=True)]
    seen = [{"watch/accuracy": 0.75, "step": 4}, {"watch/samples": ("picture", (8, 8, 4)), "step": 4}]
    assert called(library, "log") == expected + seen
    assert called(library, "finish") == [0]


def test_a_run_that_goes_on_is_the_same_there(library, tmp_path):
    online = dataclasses.replace(WANDB, mode="online")
    trainer(tmp_path, wandb=online).run(until=2)
    again = trainer(tmp_path, wandb=online)
    again.resume(tmp_path / "checkpoints" / "step-000002")
    again.run()
    first, second = called(library, "init")
    assert first["id"] == second["id"]
    assert first["resume"] == second["resume"] == "allow"
    assert [values["step"] for values in called(library, "log")] == [2, 4]
    other = trainer(tmp_path / "other")
    other.resume(tmp_path / "checkpoints" / "step-000002")
    other.run(until=3)
    trainer(tmp_path).run(until=1)  # from the start: another run
    assert len({arguments["id"] for arguments in called(library, "init")}) == 3


def test_an_error_is_told(library, tmp_path):
    with pytest.raises(TrainingError, match="ended after step 1"):
        trainer(tmp_path, [gduf_batch()]).run()
    assert called(library, "finish") == [1]


def test_nothing_is_sent_unasked(library, tmp_path):
    trainer(tmp_path, wandb=WandbConfig()).run(until=1)
    assert library.calls == []
    assert not (tmp_path / "wandb-id.txt").exists()


def test_a_refusal(library, tmp_path):
    library.refusal = "no such entity"
    with pytest.raises(RuntimeError, match=r"wandb\.project is 'detectors', but W&B starts no run: no such entity"):
        trainer(tmp_path).run()


def test_a_missing_library_shows_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    loaded = []
    monkeypatch.setattr(run, "build_model", lambda *arguments: loaded.append(arguments))
    nowhere = ModelSource(checkpoint=str(tmp_path / "nowhere"))
    config = dataclasses.replace(CONFIG, output=str(tmp_path / "out"), model=nowhere, wandb=WANDB)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'unigendet\[wandb\]'") as caught:
        run.build_trainer(config)
    assert caught.value.name == "wandb"
    assert loaded == []
    assert not (tmp_path / "out").exists()


def test_settings(tmp_path):
    (tmp_path / "run.yaml").write_text("output: out\nwandb: {project: p, tags: [a, b], mode: offline}\n")
    config = load_train_config(tmp_path / "run.yaml", ["wandb.name=other"])
    assert config.wandb == WandbConfig("p", "other", mode="offline", tags=("a", "b"))
    with pytest.raises(ValueError, match=r"output is None; it must be a folder for wandb\.project to write to"):
        TrainConfig(wandb=WANDB)
    for settings, message in (
        ({"project": " "}, r"wandb\.project is ' '; it must be a name, or null"),
        ({"mode": "shared"}, r"wandb\.mode is 'shared'; it must be 'online' or 'offline'"),
        ({"tags": ("",)}, r"wandb\.tags is \('',\); it must be texts that are not empty"),
    ):
        with pytest.raises(ValueError, match=message):
            WandbConfig(**settings)
