"""Looking at a run while it trains: what is written, and that training does not notice."""

import copy
import functools
import io
import itertools
import math
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from run_data import write_run_data
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter
from watched_run import make_trainer, rows_of, write_settings

from unigendet.evaluation.detection import DetectionOutcome
from unigendet.training import trainer as trainer_module
from unigendet.training.metrics import MEMORY, TIMING, Look, mean_row
from unigendet.training.signals import StopSignals
from unigendet.training.state import checkpoints
from unigendet.training.trainer import SaveError
from unigendet.training.watch import label_loss, sample_grid

SCORES = ("accuracy", "balanced_accuracy", "f1", "auc", "average_precision", "label_loss", "calibration_error")


@pytest.fixture
def make(watched_data, tmp_path):
    return functools.partial(make_trainer, watched_data, write_settings(watched_data, tmp_path))


def events_of(folder):
    """TensorBoard reads a folder's files by name, which ends in a count of the process: in one second, 10 before 9."""
    with tempfile.TemporaryDirectory() as padded:
        for file in (folder / "tensorboard").iterdir():
            shutil.copy(file, Path(padded) / f"{file.stem}.{int(file.suffix[1:]):06}")
        return EventAccumulator(padded, size_guidance={"images": 0, "scalars": 0}).Reload()


def numbers(history):
    return [{name: value for name, value in row.items() if name not in TIMING} for row in history]


def everything(made):
    """All that decides how a run goes on, copied."""
    state = made.state
    return {
        "weights": {name: p.detach().clone() for name, p in state.model.state_dict().items()},
        "flags": {name: (p.requires_grad, p.grad is None) for name, p in state.model.named_parameters()},
        "modes": {name: module.training for name, module in state.model.named_modules()},
        "average": [tensor.clone() for tensor in state.ema.tensors],
        "optimizer": copy.deepcopy(state.optimizer.state_dict()),
        "teacher": {name: tensor.clone() for name, tensor in made.stage.state_dict().items()},
        "generators": [*(g.get_state() for g in state.generators), torch.get_rng_state()],
        "other generators": [random.getstate(), np.random.get_state()],  # noqa: NPY002
        "position": made.batches.state_dict(),
        "step": state.step,
    }


def assert_same(a, b, where=""):
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor | np.ndarray):
        assert (np.asarray(a) == np.asarray(b)).all(), where
    else:
        assert a == b, where


@pytest.mark.parametrize(("stage", "precision"), [("gduf", "fp32"), ("gduf", "bf16"), ("diga", "fp32")])
def test_training_does_not_notice(make, tmp_path, stage, precision):
    """Bit for bit the same run, with explanations and samples and without."""
    settings = (f"stage={stage}", f"precision={precision}")
    plain = make(*settings, "watch.every=0", "output=null")
    watched = make(*settings, "watch.every=1", "watch.max_tokens=3")
    expected, history = plain.run(), watched.run().history
    assert numbers(history) == numbers(expected.history)
    assert_same(everything(watched), everything(plain))
    assert [row["step"] for row in rows_of(tmp_path / "out")] == [0, 1, 2, 3, 4]
    # And each look by itself leaves all as it is, in the middle of a run.
    watched = make(*settings, "watch.every=1", f"output={tmp_path / 'again'}")
    watched.run(until=2)
    watched._watch._done.clear()
    before = everything(watched)
    assert watched._watch(watched.state).step == 2
    assert_same(everything(watched), before)


def test_what_is_written(make, tmp_path):
    """The lines of watch.jsonl, the events and the pictures say the same."""
    out = tmp_path / "out"
    history = make("total_steps=5").run().history
    rows = rows_of(out)
    assert [row["step"] for row in rows] == [0, 2, 4, 5]  # before the first step, every second one, after the last
    for row in rows:
        assert list(row) == ["step", "seconds", "averaged", "images", *SCORES, "rouge_l", "undecided", "not_judged",
                             "categories", "samples"]  # fmt: skip
        assert (row["averaged"], row["images"], row["undecided"], row["not_judged"]) == (True, 4, 0, {})
        assert row["rouge_l"] is None  # there are no explanations
        assert row["categories"] == {"noise": {"images": 4, "accuracy": row["accuracy"]}}
        assert row["samples"] == f"watch/step-{row['step']:06}.png"
    events = events_of(out)
    logged = [mean_row(history[:2]), mean_row(history[2:4]), mean_row(history[4:])]
    terms = (
        "loss",
        "mse",
        "ce",
        "label",
        "grad_norm",
        "lr",
        *(name for name in TIMING if name not in ("encode_seconds", "mfu", *MEMORY)),
    )
    assert set(events.Tags()["scalars"]) == {f"train/{n}" for n in terms} | {f"watch/{n}" for n in (*SCORES, "seconds")}
    for name in terms:
        values = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert values == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in logged]
    for name in (*SCORES, "seconds"):
        values = [(event.step, event.value) for event in events.Scalars(f"watch/{name}")]
        assert values == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows]
    assert events.Tags()["images"] == ["watch/samples"]
    for event, row in zip(events.Images("watch/samples"), rows, strict=True):
        assert event.step == row["step"]
        shown = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
        assert np.array_equal(shown, np.asarray(Image.open(out / row["samples"])))
        assert shown.shape == (2 * 72 - 8, 3 * 72 - 8, 4)  # two prompts, three samples of each, eightfold
    assert sorted(p.name for p in (out / "watch").iterdir()) == [f"step-{row['step']:06}.png" for row in rows]


def test_explanations_are_compared(make, tmp_path):
    made = make("watch.max_tokens=4", "watch.prompts=[]", "total_steps=1")
    answer = "This is a real image."
    made._watch.pipeline.tokenizer = SimpleNamespace(decode=lambda ids: answer if len(ids) <= 4 else "too long")
    made.run()
    row = rows_of(tmp_path / "out")[-1]
    assert row["rouge_l"] == pytest.approx((1 + 0.8) / 2)  # "This is a fake image." has four of the five words
    assert "samples" not in row
    assert not (tmp_path / "out" / "watch").exists()


def test_the_noise_is_the_same_every_time(make):
    """Samples differ by the weights, the prompt and the seed, and by nothing else."""
    made = make("ema_decay=null")
    watch, state = made._watch, made.state
    looks = [watch(state)]
    state.step = 2
    looks.append(watch(state))
    assert np.array_equal(looks[0].samples, looks[1].samples)
    assert looks[0].scores | {"seconds": 0} == looks[1].scores | {"seconds": 0}
    cells = [looks[0].samples[y : y + 64, x : x + 64] for y in (0, 72) for x in (0, 72, 144)]
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(cells, 2))
    made.train_step(next(iter(made.batches)))
    state.step = 4
    assert not np.array_equal(watch(state).samples, looks[0].samples)
    other = make("ema_decay=null", "watch.seed=7")
    assert not np.array_equal(other._watch(other.state).samples, looks[0].samples)


def test_it_looks_at_the_averaged_weights(make):
    made, live = make(), make("watch.use_ema=false")
    for trainer in (made, live):
        with torch.no_grad():
            for tensor in trainer.ema.tensors:
                tensor.add_(torch.full_like(tensor, 0.05))
    averaged, before = made._watch(made.state), live._watch(live.state)
    live.ema.copy_to_model()
    live.state.step = 2
    after = live._watch(live.state)
    assert np.array_equal(averaged.samples, after.samples)
    assert averaged.scores | {"seconds": 0} == after.scores | {"seconds": 0}
    assert not np.array_equal(averaged.samples, before.samples)
    assert averaged.scores["label_loss"] != before.scores["label_loss"]


def test_looks_cost_a_step_no_time(make, monkeypatch):
    """Against a clock that runs only while somebody looks, every step takes no time."""
    now = [0.0]

    def look(state, ends):
        now[0] += 1000
        return Look(state.step, {"accuracy": 0.5}, None, "seen")

    made = make("watch.every=0", "output=null")
    made._watch = look
    monkeypatch.setattr(trainer_module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    history = made.run().history
    assert now[0] == 5000
    assert [row["seconds"] for row in history] == [0] * 4


@pytest.mark.parametrize("lost", ["nothing", "the last look", "half a line"])
def test_a_resumed_run_goes_on_with_its_looks(make, tmp_path, lost):
    """A run that was stopped after the checkpoint of step 2 and some work beyond it, and the same run in one piece."""
    out, whole = tmp_path / "out", make(f"output={tmp_path / 'whole'}", "total_steps=6")
    whole.run()
    first = make("total_steps=6")
    path = first.run(until=2).checkpoint
    file = out / "watch.jsonl"
    if lost == "nothing":
        first.run(until=5)
        assert [row["step"] for row in rows_of(out)] == [0, 2, 4]
        (out / "watch" / "step-000005.png").write_bytes(b"of another interval")
    elif lost == "the last look":  # killed between the checkpoint and the look
        file.write_text(file.read_text().splitlines(keepends=True)[0])
    else:
        file.write_text(file.read_text()[:-20])
    second = make("total_steps=6")
    second.resume(path)
    second.run()
    expected = [row | {"seconds": 0} for row in rows_of(tmp_path / "whole")]
    assert [row | {"seconds": 0} for row in rows_of(out)] == expected
    events, names = events_of(out), [f"step-{row['step']:06}.png" for row in expected]
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6]
    if lost == "nothing":
        for event, row in zip(events.Scalars("watch/auc"), expected, strict=True):
            assert (event.step, event.value) == (row["step"], pytest.approx(row["auc"], rel=1e-6))
        assert [event.step for event in events.Images("watch/samples")] == [0, 2, 4, 6]
    assert sorted(p.name for p in (out / "watch").iterdir()) == names
    for name in names:
        assert (out / "watch" / name).read_bytes() == (tmp_path / "whole" / "watch" / name).read_bytes()


def test_a_signal_ends_a_run_without_one_more_look(make, tmp_path, monkeypatch):
    """A scheduler gives it little time. When the run goes on, it looks first."""
    made, stop = make(), StopSignals()
    step = made.train_step

    def stopped(*arguments, **options):
        row = step(*arguments, **options)
        if row["step"] == 2:
            stop.received = signal.SIGTERM
        return row

    monkeypatch.setattr(made, "train_step", stopped)
    result = made.run(stop=stop)
    assert (result.step, result.stopped_by) == (2, signal.SIGTERM)
    assert [row["step"] for row in rows_of(tmp_path / "out")] == [0]
    again = make()
    again.resume(result.checkpoint)
    again.run()
    assert [row["step"] for row in rows_of(tmp_path / "out")] == [0, 2, 4]


def test_a_look_that_cannot_be_written(make, tmp_path):
    """Says which file it is about, and how to go on."""
    made = make("save_every=1")
    made.run(until=1)
    shutil.rmtree(tmp_path / "out" / "watch")
    (tmp_path / "out" / "watch").write_text("no folder")
    with pytest.raises(
        SaveError, match=r"after step 2: cannot write .*out/watch .*last good checkpoint is .*step-000002"
    ):
        made.run()


def test_a_new_run_forgets_the_looks_of_one_that_left_no_checkpoint(make, tmp_path):
    out = tmp_path / "out"
    (out / "watch").mkdir(parents=True)
    (out / "watch.jsonl").write_text('{"step": 0, "accuracy": 1.0}\n{"step": 9}\n')
    (out / "watch" / "step-000009.png").write_bytes(b"old")
    made = make("total_steps=1")
    made.run()
    assert [row["step"] for row in rows_of(out)] == [0, 1]
    assert "seconds" in rows_of(out)[0]
    assert not (out / "watch" / "step-000009.png").exists()


def test_metrics_reach_the_disk_before_a_checkpoint(make, tmp_path, monkeypatch):
    """The events, too, of a run that is killed later: what comes before its checkpoint is never written again."""
    made, seen = make("save_every=2", "watch.every=0"), []
    write = RecordWriter.write

    def slow(self, data):  # a thread of its own writes them
        time.sleep(0.02)
        write(self, data)

    monkeypatch.setattr(RecordWriter, "write", slow)
    save = made.save

    def watched():
        seen.append([event.step for event in events_of(tmp_path / "out").Scalars("train/loss")])
        return save()

    monkeypatch.setattr(made, "save", watched)
    made.run()
    assert seen == [[2], [2, 4]]


def test_an_image_that_cannot_be_read_counts_as_wrong(make, watched_data, tmp_path):
    """And is named; the others are judged."""
    held_out = tmp_path / "copy"
    held_out.mkdir()
    write_run_data(held_out)
    text = io.StringIO()
    console = Console(file=text, width=200)
    made = make(f"watch.detection={held_out / 'detection.json'}", "watch.limit=6", "total_steps=1", console=console)
    (held_out / "1.png").write_bytes(b"no picture")
    (held_out / "2.png").unlink()
    made.run()
    for row in rows_of(tmp_path / "out"):
        damaged, lost = str(held_out / "1.png"), str(held_out / "2.png")
        assert list(row["not_judged"]) == [damaged, lost]
        assert "cannot be decoded" in row["not_judged"][damaged]
        assert "does not exist" in row["not_judged"][lost]
        assert (row["images"], row["undecided"]) == (6, 0)
        assert row["accuracy"] <= 4 / 6
    assert "2 not judged" in text.getvalue()


def test_any_other_error_stops_the_run(make, tmp_path, monkeypatch):
    """After the checkpoint of its step, and with the model as it was."""
    made = make("save_every=1")
    generate, calls = made._watch.pipeline.generate_each, []

    def fail(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("a programming error")
        return generate(*arguments, **options)

    monkeypatch.setattr(made._watch.pipeline, "generate_each", fail)
    plain = make("watch.every=0", "output=null")
    plain.run(until=2)
    with pytest.raises(KeyError, match="a programming error") as caught:
        made.run()
    assert caught.value.__notes__ == ["while watching the run after step 2"]
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["step-000001", "step-000002"]
    assert [row["step"] for row in rows_of(tmp_path / "out")] == [0]
    assert_same(everything(made), everything(plain))


def test_progress_shows_the_last_look(make, tmp_path):
    plain, unscored, fancy = io.StringIO(), io.StringIO(), io.StringIO()
    make(console=Console(file=plain, width=200)).run()
    lines = [line.split("  ")[1:3] for line in plain.getvalue().splitlines()]
    assert [line[0] for line in lines] == [f"step {n}/4" for n in (0, 2, 2, 4, 4)]
    assert ["held out: accuracy" in line[1] for line in lines] == [True, False, True, False, True]
    out = tmp_path / "pictures"
    make("watch.detection=null", f"output={out}", "total_steps=1", console=Console(file=unscored, width=200)).run()
    assert unscored.getvalue().splitlines()[0].endswith(f"  step 0/1  samples {out / 'watch/step-000000.png'}")
    console = Console(file=fancy, force_terminal=True, width=250)
    make("total_steps=3", f"output={tmp_path / 'other'}", console=console).run()
    assert "tokens/s  held out: accuracy" in fancy.getvalue()


def test_a_folder_of_real_and_fake_images(make, watched_data, tmp_path):
    """And they are chosen evenly."""
    folder = tmp_path / "sorted"
    for i in range(6):
        place = folder / ("real" if i % 2 else "fake/noise")
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(watched_data / "held_out" / f"{i}.png", place)
    made = make(f"watch.detection={folder}", "watch.limit=4", "total_steps=1")
    names = [str(record.image.relative_to(folder)) for record in made._watch.watched.held_out]
    assert names == ["real/1.png", "real/3.png", "fake/noise/0.png", "fake/noise/2.png"]
    made.run()
    for row in rows_of(tmp_path / "out"):
        assert {name: one["images"] for name, one in row["categories"].items()} == {"real": 2, "noise": 2}


def test_every_image_is_asked_its_own_question(make, monkeypatch):
    made, asked = make("watch.prompts=[]"), []
    encode = made._watch.pipeline.tokenizer.encode
    monkeypatch.setattr(made._watch.pipeline.tokenizer, "encode", lambda text: asked.append(text) or encode(text))
    made._watch(made.state)
    assert set(asked) == {"Real?"} != {made.config.datasets.views.question}


def test_label_loss():
    outcomes = [DetectionOutcome("a", "g", 1, 1, 0.8), DetectionOutcome("b", "g", 0, 1, 0.6)]
    expected = -(math.log(0.8) + math.log(0.4)) / 2
    assert label_loss(outcomes) == pytest.approx(expected)
    assert label_loss([*outcomes, DetectionOutcome("c", "g", 1, None)]) == pytest.approx(expected)
    assert label_loss([DetectionOutcome("c", "g", 1, None)]) is None
    assert label_loss([DetectionOutcome("c", "g", 1, 0, 0.0)]) == pytest.approx(7 * math.log(10))


def test_large_samples_are_reduced_in_the_grid():
    images = [Image.new("RGB", (1024, 512), (10 * i, 0, 0)) for i in range(3)]
    grid = sample_grid(images, 2)
    assert grid.shape == (256 * 2 + 8, 512 * 2 + 8, 4)
    assert grid[100, 600].tolist() == [10, 0, 0, 255]
    assert grid[260, 100, 3] == 0
    assert sample_grid([Image.new("L", (100, 60), 9)], 1).shape == (60, 100, 4)
