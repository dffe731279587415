"""One of several processes that end together, whatever they do meanwhile: ``python failure_run.py FOLDER JOB RANK…``.

``killed``: the processes RANK are killed once all are there; the others wait for something that is no socket.
``lost``: the same, but the others wait for them in a collective, and do not react to torchrun's signal.
``lasting``: all but RANK leave the run at once; these take longer than a process may give no sign of life.
``together``: all fail. The first one then has files to close, for two seconds unless a signal comes, which it prints.
"""

import os
import signal
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

from unigendet.training import failures
from unigendet.training.config import TrainConfig
from unigendet.training.parallel import processes
from unigendet.training.signals import StopSignals

POLL, MISSED = 0.05, 20
LIMIT = POLL * failures._BEAT * MISSED  # seconds that a process may give no sign of life


def meet(parallel, folder):
    """Wait for the others, without a collective that the first to go on could spoil for them by its end."""
    Path(folder, f"here-{parallel.rank}").touch()
    deadline = time.monotonic() + 60
    while not all(Path(folder, f"here-{rank}").exists() for rank in range(parallel.world_size)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def together(parallel):
    error = OSError(f"the disk of process {parallel.rank} is gone")
    with StopSignals() as stop:
        if parallel.main:
            parallel.failing(error, False)
            deadline = time.monotonic() + 2
            while stop.received is None and time.monotonic() < deadline:
                time.sleep(0.01)
            print("closed without a signal" if stop.received is None else stop.received.name, file=sys.stderr)
    raise error


def main(folder, job, *ranks):
    grace = {"together": 60.0, "lost": failures._GRACE}  # torchrun must see an end meanwhile; the first it cuts short
    failures._POLL, failures._GRACE, failures._MISSED = POLL, grace.get(job, 0.5), MISSED
    with StopSignals() if job == "lost" else nullcontext(), processes(TrainConfig(device="cpu")) as parallel:
        meet(parallel, folder)
        chosen = str(parallel.rank) in ranks
        if job == "together":
            together(parallel)
        if job == "lost" and not chosen:
            parallel.sum([1.0])
        if job in ("killed", "lost") and chosen:
            os.kill(os.getpid(), signal.SIGKILL)
        if job == "killed":
            with StopSignals():  # which note the one that torchrun sends
                threading.Event().wait(60)
            raise AssertionError("it was left alone")
        if chosen:
            threading.Event().wait(1.5 * LIMIT)


if __name__ == "__main__":
    main(*sys.argv[1:])
