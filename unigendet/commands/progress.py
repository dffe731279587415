"""How far a command has come, on standard error: a bar on a terminal, elsewhere a plain line every so often."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from typing import Any

EVERY = 15.0  # seconds from one plain line to the next


class Progress:
    """A context manager that counts things done.

    Rows that go to a terminal while the bar stands there are to be written inside it: the bar stays below them.

    Args:
        label: the command, as plain lines begin.
        total: how many there are.
        what: what is counted, in the plural.
        clock: seconds.
    """

    def __init__(
        self, label: str, total: int, what: str = "images", *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._label, self._total, self._what, self._clock = label, total, what, clock
        self.done = 0
        self._begin = self._said = clock()
        self._bar: Any = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
            bar = Bar(*columns, console=Console(stderr=True), transient=True, redirect_stdout=sys.stdout.isatty())
            self._bar = self._stack.enter_context(bar)
            self._task = bar.add_task("", total=self._total)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def advance(self) -> None:
        """One more is done."""
        self.done += 1
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)
            return
        now = self._clock()
        if now - self._said >= EVERY and self.done < self._total:
            self._said = now
            rate = self.done / (now - self._begin)
            left = (self._total - self.done) / rate
            print(f"{self._label}: {self.done} of {self._total} {self._what}, about {_duration(left)} left",
                  file=sys.stderr, flush=True)  # fmt: skip


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
