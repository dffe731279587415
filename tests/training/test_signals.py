"""Signals to a training run: it ends after its step with a checkpoint, says how to go on, and does go on."""

import os
import re
import shlex
import signal
import threading

import pytest
from run_process import finish, history, run, same_state, start, write_run

from unigendet.cli import main
from unigendet.training.signals import StopSignals
from unigendet.training.state import checkpoints


def wait_for(process, text):
    """Read standard error up to the line that contains ``text``; returns the lines."""
    lines = []
    for line in process.stderr:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"the process ended without {text!r}: {''.join(lines)}")


def steps(output):
    return [int(path.name.removeprefix("step-")) for path in checkpoints(output)]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_ends_the_run_with_a_checkpoint(tmp_path, number, workers):
    """Sent to the whole process group, as a terminal and schedulers do: data workers do not react."""
    file = write_run(tmp_path, total_steps=100_000)
    process = start("train", "--config", file, f"loader.num_workers={workers}", start_new_session=True)
    wait_for(process, "step 2/")
    os.killpg(process.pid, number)
    code, err = finish(process)
    assert code == 128 + number
    name = signal.Signals(number).name
    lines = err.splitlines()
    assert [line for line in lines if "  step " not in line] == [
        f"{name}: stopping after the present step (a second signal ends the run at once)",
        lines[-1],
    ]
    (checkpoint,) = checkpoints(tmp_path / "out")
    done = len(history(tmp_path / "out"))
    assert checkpoint.name == f"step-{done:06}"
    message = re.fullmatch(
        rf"unigendet train: {name} after step (\d+); its checkpoint is (.*); go on with: unigendet (.*)", lines[-1]
    )
    assert (int(message[1]), message[2]) == (done, str(checkpoint))
    arguments = shlex.split(message[3])
    assert arguments == ["train", "--config", str(file), f"loader.num_workers={workers}", "--resume"]
    assert main([*arguments[:-1], "total_steps=" + str(done + 1), "--resume"]) == 0
    assert steps(tmp_path / "out") == [done, done + 1]


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)])
def test_a_second_signal_ends_the_run_at_once(tmp_path, first, second):
    file = write_run(tmp_path, save_every=1)
    process = start("train", "--config", file, wrapped=["wait:2"])
    wait_for(process, "waiting in step 2")
    process.send_signal(first)
    wait_for(process, "stopping after the present step")
    process.send_signal(second)
    assert finish(process)[0] == -second  # a shell shows 128 + second
    assert steps(tmp_path / "out") == [1]


def signal_at(monkeypatch, where, number=signal.SIGTERM):
    """A signal to this very process just before the ``where``-th step of a run."""
    from unigendet.training.trainer import Trainer

    inner = Trainer.train_step

    def step(trainer, *args, **options):
        if trainer.state.step + 1 == where:
            os.kill(os.getpid(), number)
        return inner(trainer, *args, **options)

    monkeypatch.setattr(Trainer, "train_step", step)


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path, monkeypatch, capfd):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    base = ["train", "--config", str(write_run(tmp_path))]
    assert main([*base, f"output={whole}"]) == 0
    with monkeypatch.context() as patch:
        signal_at(patch, 3)
        assert main([*base, f"output={parts}"]) == 143
    assert main([*base, f"output={parts}", "--resume"]) == 0
    assert steps(parts) == [3, 6]
    same_state(checkpoints(whole)[-1], checkpoints(parts)[-1])
    assert history(whole) == history(parts)


def test_a_signal_in_the_last_step_changes_nothing(tmp_path, monkeypatch, capfd):
    file = write_run(tmp_path, total_steps=2)
    signal_at(monkeypatch, 2, signal.SIGINT)
    assert main(["train", "--config", str(file)]) == 0
    assert steps(tmp_path / "out") == [2]


def test_a_signal_without_an_output_folder(tmp_path, monkeypatch, capfd):
    file = write_run(tmp_path)
    signal_at(monkeypatch, 2)
    assert main(["train", "--config", str(file), "output=null"]) == 143
    last = capfd.readouterr().err.splitlines()[-1]
    assert last == (
        f"unigendet train: SIGTERM after step 2; nothing is saved; start again with: "
        f"unigendet train --config {file} output=null"
    )


def test_a_resumed_run_that_saved_nothing_goes_on_from_where_it_began(tmp_path, monkeypatch, capfd):
    file = write_run(tmp_path, total_steps=1)
    assert main(["train", "--config", str(file)]) == 0
    (first,) = checkpoints(tmp_path / "out")
    signal_at(monkeypatch, 2)
    base = ["train", "--config", str(file), "output=null", "total_steps=3", "--resume", str(first)]
    assert main(base) == 143
    last = capfd.readouterr().err.splitlines()[-1]
    head = "unigendet train: SIGTERM after step 2; nothing is saved; go on again with: unigendet "
    assert last.startswith(head)
    assert shlex.split(last.removeprefix(head)) == base


def test_a_signal_during_a_save_is_not_lost(tmp_path, monkeypatch, capfd):
    """It comes after the step's last look; no step more is done, and nothing is saved twice."""
    from unigendet.training.trainer import Trainer

    file, inner, saves = write_run(tmp_path, save_every=2), Trainer.save, []

    def save(trainer):
        saves.append(trainer.state.step)
        os.kill(os.getpid(), signal.SIGTERM)
        return inner(trainer)

    monkeypatch.setattr(Trainer, "save", save)
    assert main(["train", "--config", str(file)]) == 143
    assert saves == steps(tmp_path / "out") == [2]


def test_handlers_are_restored_and_belong_to_the_main_thread():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopSignals() as stop:
        assert signal.getsignal(signal.SIGTERM) not in before
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received is signal.SIGTERM
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before

    def elsewhere():
        with StopSignals() as stop:
            inside.append((stop.received, signal.getsignal(signal.SIGTERM)))

    inside = []
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert inside == [(None, before[0])]


@pytest.mark.parametrize(("first", "second"), [(signal.SIGTERM, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)])
def test_a_request_that_arrives_twice_is_one(monkeypatch, capfd, first, second):
    """Within a second; a later signal is another request, and has its default effect."""
    now, ended = [50.0], []
    with StopSignals(clock=lambda: now[0]) as stop:
        os.kill(os.getpid(), first)
        for later in (0.0, 0.01, 0.98):
            now[0] = 50.0 + later
            os.kill(os.getpid(), second)
        assert stop.received is first
        assert capfd.readouterr().err.count("stopping after the present step") == 1
        kill = os.kill
        with monkeypatch.context() as patch:
            patch.setattr(os, "kill", lambda pid, number: ended.append((pid, number, signal.getsignal(number))))
            now[0] = 51.0
            kill(os.getpid(), second)
        assert ended == [(os.getpid(), second, signal.SIG_DFL)]
        assert stop.received is first


def test_an_ignored_signal_stays_ignored():
    """A shell starts what runs in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.received is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_command_as_a_process_finishes(tmp_path):
    """The frame of the other tests: without a mishap the exit code is 0."""
    assert run("train", "--config", write_run(tmp_path, total_steps=1))[0] == 0
