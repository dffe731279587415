"""Processes of a run end together: by an error, which all of them say, and when one is killed."""

import json
import signal
from pathlib import Path
from types import SimpleNamespace

import failure_run
import pytest
import ranks
import torch.distributed as dist

from unigendet.training import failures
from unigendet.training.failures import FailureWatch, ToldElsewhere

PROGRAM = Path(failure_run.__file__)


class Clock:
    """A time that passes while it is waited for; in place of a watch's event and of the module ``time``."""

    def __init__(self):
        self.now, self.plans = 0.0, []

    def at(self, time, action):
        self.plans.append((time, action))

    def wait(self, seconds):
        self.now += seconds
        due = [action for time, action in self.plans if time <= self.now]
        self.plans = [plan for plan in self.plans if plan[0] > self.now]
        for action in due:
            action()
        return False

    def set(self):
        pass

    def sleep(self, seconds):
        self.wait(seconds)

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(failures, "time", SimpleNamespace(monotonic=clock.monotonic, sleep=clock.sleep))
    return clock


@pytest.fixture
def watches():
    """Those of three processes, whose threads do not run."""
    store = dist.HashStore()
    return [FailureWatch(store, rank, 3) for rank in range(3)]


def outlasted(watch, clock):
    """After what time ``watch`` ends its process, which does not end by itself."""
    watch._stopped, began = clock, clock.now
    assert watch._outlasts(watch._read())
    return clock.now - began


def test_the_others_end_soon_after_the_cause(watches, clock):
    watches[1].report(OSError("the disk is gone"))
    assert watches[0]._read() == (1, "process 1 failed: the disk is gone", failures._CLOSING)
    assert outlasted(watches[0], clock) == pytest.approx(failures._GRACE, abs=2 * failures._POLL)


@pytest.mark.parametrize("saving", [True, False])
def test_the_others_wait_for_files_that_are_closed(watches, clock, saving):
    """They know the cause meanwhile."""
    watches[1].failing(OSError("the disk is gone"), saving)
    _, what, patience = watches[0]._read()
    plan = "; the checkpoint that is being written is completed first"
    assert (what, patience) == (f"process 1 failed: the disk is gone{plan * saving}", 600 if saving else 60)
    clock.at(50, lambda: watches[1].report(OSError("the disk is gone")))
    assert outlasted(watches[0], clock) == pytest.approx(50 + 2 * failures._GRACE, abs=4 * failures._POLL)


@pytest.mark.parametrize("saving", [True, False])
def test_files_that_are_never_closed(watches, clock, saving):
    """The process that failed ends first, so that torchrun names it."""
    watches[1].failing(OSError("the disk is gone"), saving)
    limit = 600 if saving else 60
    assert outlasted(watches[1], clock) == pytest.approx(limit, abs=2 * failures._POLL)
    assert outlasted(watches[0], clock) == pytest.approx(limit + failures._GRACE, abs=2 * failures._POLL)


def test_a_process_that_fails_while_it_waits_to_be_ended_has_time_for_its_files(watches, clock):
    """The usual case: the end of the one that failed is what makes the collectives of the others fail."""
    watches[1].report(OSError("the disk is gone"))
    wait = failures._GRACE - 1
    clock.at(clock.now + wait, lambda: watches[0].failing(RuntimeError("connection closed"), False))
    assert outlasted(watches[0], clock) == pytest.approx(wait + failures._CLOSING, abs=2 * failures._POLL)


def reported(watch, error, clock):
    """After what time a process that fails by ``error`` ends."""
    began = clock.now
    watch.report(error)
    return clock.now - began


def test_a_process_that_fails_alone_does_not_wait_for_long(watches, clock, capfd):
    """The first one does not fail; were it to, it would do so about now."""
    alone = reported(watches[1], OSError("the disk is gone"), clock)
    assert alone == pytest.approx(failures._GRACE, abs=2 * failures._POLL)
    assert capfd.readouterr().err == "unigendet train: process 1 failed: the disk is gone\n"


@pytest.mark.parametrize("error", [OSError("the disk is gone"), ToldElsewhere("seed is -1")])
def test_the_first_process_ends_before_the_others_that_fail(watches, clock, error, capfd):
    """It tells of the error, and closes W&B. The others then give torchrun time to see its end."""
    clock.at(4, lambda: watches[0].failing(OSError("the disk is gone"), False))
    clock.at(50, lambda: watches[0].report(OSError("the disk is gone")))
    assert reported(watches[1], error, clock) == pytest.approx(50 + failures._GRACE, abs=8 * failures._POLL)
    told = isinstance(error, ToldElsewhere)
    assert watches[2]._read().rank == (0 if told else 1)
    assert capfd.readouterr().err == ("" if told else "unigendet train: process 1 failed: the disk is gone\n")


@pytest.mark.parametrize("saving", [True, False])
def test_a_first_process_that_never_ends(watches, clock, saving):
    watches[0].failing(OSError("the disk is gone"), saving)
    limit = (600 if saving else 60) + failures._GRACE
    assert reported(watches[1], OSError("the disk is gone"), clock) == pytest.approx(limit, abs=2 * failures._POLL)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_has_lost_touch(watches, clock, rank, capfd):
    """It does not name itself the cause, and torchrun has time to see the end of another one."""
    waited = reported(watches[rank], RuntimeError("connection closed"), clock)
    assert waited == pytest.approx(failures._GRACE, abs=5 * failures._POLL)
    what = (
        f"process {rank} failed, perhaps by losing touch with another one (torchrun's report names the first to end): "
        "connection closed"
    )
    assert watches[2]._read().what == what
    assert capfd.readouterr().err == f"unigendet train: {what}\n"


def test_a_collective_that_fails_is_not_the_cause(watches, clock, monkeypatch, capfd):
    """The process is ended, in its turn and by what the first one says."""
    ended, said, say = [], [], FailureWatch._say

    def end(code):
        ended.append((code, clock.now))
        raise SystemExit

    def note(watch, failure):
        said.append(clock.now)
        say(watch, failure)

    monkeypatch.setattr(failures.os, "_exit", end)
    monkeypatch.setattr(FailureWatch, "_say", note)
    # The clock does not wait for a thread, so what the thread does is done where it is waited for.
    monkeypatch.setattr(FailureWatch, "join", FailureWatch.run)
    watches[1].report(OSError("the disk is gone"))
    clock.now = 0.0
    capfd.readouterr()
    watches[0]._stopped, error = clock, RuntimeError("connection closed")
    watches[0].failing(error, False)
    with pytest.raises(SystemExit):
        watches[0].report(error)
    assert said == [failures._POLL]  # at its first look
    assert ended == [(1, pytest.approx(failures._GRACE, abs=3 * failures._POLL))]
    assert capfd.readouterr().err == "unigendet train: process 0 ends, because process 1 failed: the disk is gone\n"


def test_an_error_of_its_own_is_raised(watches, clock, monkeypatch):
    """Also by a process that is not the first to fail, or whose collective fails before any other process has."""
    monkeypatch.setattr(FailureWatch, "join", None)
    watches[1].report(RuntimeError("a collective"))
    watches[0].report(OSError("the disk is gone"))
    assert watches[2]._read().rank == 1


def test_signs_of_life(watches):
    """As long as they come, however late a process is; of two that are killed, one is named."""
    for _ in range(3 * failures._MISSED):
        for watch in watches:
            watch._beat()
    for _ in range(failures._MISSED - 1):
        watches[0]._beat()
    watches[1]._beat()
    for _ in range(failures._MISSED):
        watches[0]._beat()
        assert watches[0]._read() is None
    watches[0]._beat()
    assert watches[0]._read() == (1, "process 1 is gone (no sign of life for 60 s)", 0.0)


def test_a_process_that_never_gave_a_sign_of_life(watches):
    for _ in range(failures._MISSED + 1):
        assert watches[0]._read() is None
        watches[0]._beat()
    assert watches[0]._read().rank == 1


def under_torchrun(count, folder, *job):
    """Standard error of a job that fails, without torchrun's report; what that says of the root cause."""
    agent = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count)
    ((code, _, err),) = ranks.finish(ranks.start(1, *agent, PROGRAM, folder, *job), timeout=120)
    assert code != 0
    ours, _, report = err.partition("ChildFailedError")
    return ours, report.partition("Root Cause")[2]


def test_an_error_of_all_processes_under_torchrun(tmp_path):
    """The first one closes its files undisturbed, and says its error; so do the others."""
    err, cause = under_torchrun(2, tmp_path, "together")
    assert "closed without a signal\n" in err
    assert "SIGTERM: stopping" not in err
    assert "[rank0]: OSError: the disk of process 0 is gone" in err
    assert "unigendet train: process 1 failed: the disk of process 1 is gone\n" in err
    assert "rank      : 0 " in cause


def test_a_process_that_is_killed_in_a_collective(tmp_path):
    """The others lose touch with it, which makes none of them the cause."""
    err, cause = under_torchrun(3, tmp_path, "lost", "2")
    assert "failed, perhaps by losing touch with another one (torchrun's report names the first to end): " in err
    assert "rank      : 2 " in cause
    assert "SIGKILL" in cause


def test_processes_that_are_killed_under_torchrun(tmp_path, monkeypatch):
    """Two neighbours of three. The third one has torchrun's signal, and would have half an hour to react to it."""
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "1800")
    err, cause = under_torchrun(3, tmp_path, "killed", "1", "2")
    assert "it was left alone" not in err
    limit = f"no sign of life for {failure_run.LIMIT:.0f} s"
    assert f"unigendet train: process 0 ends, because process 1 is gone ({limit})\n" in err
    assert "SIGKILL" in cause


def test_the_process_with_the_store_is_killed(tmp_path):
    (dead, _, _), (code, _, err) = ranks.finish(ranks.start(2, PROGRAM, tmp_path, "killed", "0"), timeout=120)
    assert (dead, code) == (-signal.SIGKILL, 1)
    assert "unigendet train: process 1 ends, because process 0 is gone\n" in err


def test_a_process_that_ends_later_is_waited_for(tmp_path):
    """Those that have nothing more to do give signs of life until all are ready."""
    for code, _, err in ranks.finish(ranks.start(2, PROGRAM, tmp_path, "lasting", "0"), timeout=120):
        assert code == 0, err
        assert "ends, because" not in err


def test_what_is_stored_can_be_read(watches, clock):
    """An error's text may be anything."""
    watches[2].report(OSError('"{\n€\\'))
    assert watches[0]._read().what == 'process 2 failed: "{\n€\\'
    assert json.loads(watches[0]._store.get("failure"))[0] == 2
