"""A run of several processes ends together: a thread in each of them looks for the failure of another.

A process that waits for another one inside a collective waits for ever, or for the half an hour after which PyTorch
gives up. So the processes tell each other, over the store at which they have met, that

* one of them has failed: at once, with its error. It may still have files to close and a checkpoint under way, which
  needs all processes. They wait until it has ended, some time at most, and then end;
* they are alive: each counts up a number of its own, and looks at that of the next one, in a ring. A process that was
  killed says nothing, and its number stands still. Of several that are killed, one has a neighbour that is alive.

The first failure that reaches the store counts as the cause, and all processes print it. An error of a process's own
gets there before those that it makes the collectives of others fail with. A process that is killed has none there: the
first whose collective fails then counts, and can only say that it may have lost touch with another one.

torchrun names as the root cause the process that it sees end first, and then sends the others SIGTERM, and SIGKILL half
a minute later. So

* the process that is the cause ends some seconds before the others;
* where process 0 fails too, the others outlast it: it tells of an error that all have alike, and closes W&B for all;
* one that may have lost touch waits, so that torchrun sees before that which one ended first.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

_POLL = 0.25  # seconds between two looks for another process's failure
_GRACE = 5.0  # seconds from its end to that of the others: torchrun names as the cause the process that ends first
_CLOSING = 60.0  # seconds at most to close files: W&B, say, sends what it has left
_SAVING = 600.0  # the same where a checkpoint is being written too: hundreds of GB, which are worth some minutes
_BEAT = 4  # looks from one sign of life to the next: a second
# Signs of life that a process may miss. A call that holds the interpreter's lock stops them (the fork of a data worker,
# an import, a large JSON file), for seconds at most; a minute is far from that, and from the half an hour to be saved.
_MISSED = 60


class ToldElsewhere(SystemExit):
    """Ends this process with exit code 1 and without a word: process 0 tells of the same error."""

    def __init__(self, text: str) -> None:
        super().__init__(1)
        self._text = text

    def __str__(self) -> str:
        return self._text


class Failure(NamedTuple):
    """What the store holds of the first failure.

    Attributes:
        rank: of the process that failed; None: no process of the run.
        what: happened, as the end of a sentence that begins with "because".
        patience: seconds that the process has to end by itself.
    """

    rank: int | None
    what: str
    patience: float


def meeting_store() -> dist.Store:
    """A connection of its own to the store at which the processes of a run have met: another may be busy waiting."""
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=30))
    return dist.PrefixStore(f"unigendet/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


class FailureWatch(threading.Thread):
    """The thread. It ends this process when another one has failed, and when this one has but does not end.

    Args:
        store: of the run; see ``meeting_store``.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        super().__init__(name="failure-watch", daemon=True)
        self._store, self._rank, self._next = store, rank, (rank + 1) % world_size
        self._seen, self._still = -1, 0  # the next process's number, and looks since it changed
        self._stopped, self._failed = threading.Event(), False
        self._limit: float | None = None  # the time by which this process, which has failed, must have closed its files

    def run(self) -> None:
        """Look until there is something to see, or nothing more to look for."""
        looks, failure = 0, None
        while failure is None:
            if self._stopped.wait(_POLL):
                return
            looks += 1
            try:
                if looks % _BEAT == 0:
                    self._beat()
                failure = self._read()
            except RuntimeError:
                failure = Failure(None, f"{_store_holder()} is gone", 0.0)
        if not self._failed:
            self._say(failure)
        if self._outlasts(failure):
            if self._failed:  # and has not come to say so itself
                self._say(failure)
            os._exit(1)

    def failing(self, error: BaseException, saving: bool) -> None:
        """This process ends by ``error``, and has files to close first: the others are told now.

        ``saving``: a checkpoint is being written, which is to be completed.
        """
        patience = _SAVING if saving else _CLOSING
        self._limit = time.monotonic() + patience
        self._tell(error, patience, "; the checkpoint that is being written is completed first" * saving)

    def report(self, error: BaseException) -> None:
        """This process ends now, by ``error``; but in its turn, which see at the head of this file.

        A collective that fails because another process has failed says nothing of use, such as that a connection is
        closed: then this process is ended here, by what the other one says.
        """
        told, lost = isinstance(error, ToldElsewhere), _of_collective(error)
        if not told and not self._tell(error, _CLOSING) and lost:
            self._limit = None
            self._has_closed()
            self.join()
            return
        self.stop()
        if not told and (self._rank != 0 or lost):
            self._print(self._account(error))  # now: torchrun may end this process while it waits
        if self._rank != 0:
            self._outlast_first(_CLOSING if told else _GRACE)
        elif lost:
            time.sleep(_GRACE)
        if self._has_closed() and self._rank == 0:
            time.sleep(4 * _POLL)  # it may hold the store: the others must have had time to look

    def stop(self) -> None:
        """Nothing more to look for."""
        self._stopped.set()

    def _tell(self, error: BaseException, patience: float, plan: str = "") -> bool:
        """Whether this process is the first that failed."""
        self._failed = not _of_collective(error)
        try:
            self._store.set(f"failed/{self._rank}", str(patience))
            first = self._first(Failure(self._rank, self._account(error) + plan, patience))
        except RuntimeError:  # the store is gone, which is another's failure
            return False
        self._failed |= first.rank == self._rank
        return first.rank == self._rank

    def _account(self, error: BaseException) -> str:
        """What this process knows of its failure."""
        if isinstance(error, KeyboardInterrupt):
            return f"process {self._rank} was interrupted"
        touch = ", perhaps by losing touch with another one (torchrun's report names the first to end)"
        return f"process {self._rank} failed{touch if _of_collective(error) else ''}: {error}"

    def _has_closed(self) -> bool:
        """Note that this process has closed its files; whether there is still a store to note it in."""
        try:
            self._store.set(f"ended/{self._rank}", "")
        except RuntimeError:
            return False
        return True

    def _outlast_first(self, expected: float) -> None:
        """If process 0 fails within so many seconds, wait until it has ended and torchrun has seen that."""
        began, patience = time.monotonic(), None
        while not (ended := self._has_ended(0)):
            if time.monotonic() - began >= (expected if patience is None else patience):
                break
            with contextlib.suppress(RuntimeError):  # the store is gone, which the next look shows
                if self._store.check(["failed/0"]):
                    patience = float(self._store.get("failed/0"))
            time.sleep(_POLL)
        if ended or patience is not None:
            time.sleep(_GRACE)

    def _first(self, failure: Failure) -> Failure:
        """The first failure of the run: ``failure``, unless there is one already."""
        return Failure(*json.loads(self._store.compare_set("failure", "", json.dumps(failure))))

    def _read(self) -> Failure | None:
        return Failure(*json.loads(self._store.get("failure"))) if self._store.check(["failure"]) else None

    def _beat(self) -> None:
        """Give a sign of life, and look for that of the next process.

        Time is counted in looks: a machine that sleeps, or is slow, stops both.
        """
        self._store.add(f"alive/{self._rank}", 1)
        seen = self._store.add(f"alive/{self._next}", 0)
        self._still = self._still + 1 if seen == self._seen else 0
        self._seen = seen
        if self._still >= _MISSED:
            seconds = _MISSED * _BEAT * _POLL
            what = f"process {self._next} is gone (no sign of life for {seconds:.0f} s)"
            self._first(Failure(self._next, what, 0.0))

    def _say(self, failure: Failure) -> None:
        self._print(f"process {self._rank} ends, because {failure.what}")

    def _print(self, text: str) -> None:
        print(f"unigendet train: {text}", file=sys.stderr, flush=True)

    def _outlasts(self, failure: Failure) -> bool:
        """Wait for the end of this process; whether it has not come in due time: some time after that of the cause.

        A process that has failed itself, be it because of the other one, has the time that its own files may take.
        """
        began, ended = time.monotonic(), None
        while not self._stopped.wait(_POLL):
            now, limit = time.monotonic(), self._limit
            if limit is not None:
                if now >= limit:
                    return True
                continue
            if ended is None and (now - began >= failure.patience or self._has_ended(failure.rank)):
                ended = now
            if ended is not None and now - ended >= _GRACE:
                return True
        return False

    def _has_ended(self, rank: int | None) -> bool:
        try:
            return self._store.check([f"ended/{rank}"])
        except RuntimeError:  # the store has, too
            return True


def _of_collective(error: BaseException) -> bool:
    """Whether a collective may have failed so because another process has."""
    return type(error) is RuntimeError or isinstance(error, dist.DistError)


def _store_holder() -> str:
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return "torchrun of the first machine" if agent else "process 0"
