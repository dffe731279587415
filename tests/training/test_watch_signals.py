"""A signal while a run looks at its model: the look is left, the checkpoint is written, and nothing else is lost."""

import functools
import os
import signal
from pathlib import Path

import pytest
import torch
from watched_run import make_trainer, note_while, rows_of, write_settings

from unigendet.training.signals import StopSignals
from unigendet.training.state import checkpoints


@pytest.fixture
def make(watched_data, tmp_path):
    return functools.partial(make_trainer, watched_data, write_settings(watched_data, tmp_path))


@pytest.mark.parametrize("where", ["judging", "sampling"])
def test_a_signal_ends_the_look_it_comes_in(make, tmp_path, monkeypatch, where):
    """After one image or one step of sampling; there is a checkpoint though none was due, and the run goes on."""
    whole = make(f"output={tmp_path / 'whole'}").run()
    made, stop = make(), StopSignals()
    with monkeypatch.context() as patch:
        seen = note_while(patch, made, stop, where, 2)
        result = made.run(stop=stop)
    assert (result.step, result.stopped_by) == (2, signal.SIGTERM)
    assert seen.count(2) == 1 < seen.count(0)
    assert made.state.model.training
    assert torch.is_grad_enabled()
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["step-000002"]
    assert [row["step"] for row in rows_of(tmp_path / "out")] == [0]
    assert [path.name for path in (tmp_path / "out" / "watch").iterdir()] == ["step-000000.png"]
    again = make()
    again.resume(result.checkpoint)
    history = again.run().history
    assert [row["loss"] for row in history] == [row["loss"] for row in whole.history]
    expected = [row | {"seconds": 0} for row in rows_of(tmp_path / "whole")]
    assert [row | {"seconds": 0} for row in rows_of(tmp_path / "out")] == expected


def test_a_signal_in_the_first_look(make, tmp_path, monkeypatch):
    """Nothing is lost, so nothing is saved."""
    made, stop = make(), StopSignals()
    note_while(monkeypatch, made, stop, "judging", 0)
    result = made.run(stop=stop)
    assert (result.step, result.stopped_by, result.checkpoint) == (0, signal.SIGTERM, None)
    assert rows_of(tmp_path / "out") == []


@pytest.mark.parametrize("when", ["in the last step", "in the last look"])
def test_a_complete_run_has_its_last_look(make, tmp_path, monkeypatch, when):
    made, stop = make(), StopSignals()
    if when == "in the last look":
        note_while(monkeypatch, made, stop, "judging", 4)
    else:
        step = made.train_step

        def stopped(*arguments, **options):
            if made.state.step == 3:
                stop.received = signal.SIGTERM
            return step(*arguments, **options)

        monkeypatch.setattr(made, "train_step", stopped)
    result = made.run(stop=stop)
    assert (result.step, result.stopped_by) == (4, None)
    assert [row["step"] for row in rows_of(tmp_path / "out")] == [0, 2, 4]


def test_looks_reach_the_disk(make, tmp_path, monkeypatch):
    """Before they count as done: a later checkpoint would count on them."""
    out, on_disk, fsync = tmp_path / "out", {}, os.fsync

    def record(handle):
        path = os.readlink(f"/proc/self/fd/{handle}")
        on_disk[path] = Path(path).read_bytes() if os.path.isfile(path) else sorted(os.listdir(path))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", record)
    made = make()
    for step in (0, 2):
        made.state.step = step
        made._watch(made.state)
        picture = out / "watch" / f"step-{step:06}.png"
        assert on_disk[str(out / "watch.jsonl")] == (out / "watch.jsonl").read_bytes()
        assert len(rows_of(out)) == 1 + step // 2
        assert on_disk[str(picture)] == picture.read_bytes()
        assert picture.name in on_disk[str(out / "watch")]
    assert {"watch", "watch.jsonl"} <= set(on_disk[str(out)])
