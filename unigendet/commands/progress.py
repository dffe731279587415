"""How far a command has come, on standard error: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
from types import TracebackType
from typing import Any


class Progress:
    """A context manager that counts ``total`` things called ``unit``.

    Without a terminal it says how many are done after ``every`` of them, unless that is all.
    """

    def __init__(self, total: int, unit: str, *, every: int) -> None:
        self._total, self._unit, self._every, self._done = total, unit, every, 0
        self._bar: Any = None
        self._by_steps = False
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Progress:
        if sys.stderr.isatty() and self._total:
            self._bar = self._stack.enter_context(_bar())
            self._task = self._bar.add_task("", total=1.0, text=self._text())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _text(self) -> str:
        return f"{self._done}/{self._total} {self._unit}"

    def steps(self, done: int, steps: int) -> None:
        """So many of the work's steps are done; only a bar shows them, and then it goes by steps, not by things."""
        if self._bar is not None:
            self._by_steps = True
            self._bar.update(self._task, completed=done / steps)

    def count(self) -> None:
        """One thing more is done."""
        self._done += 1
        if self._bar is not None:
            share = None if self._by_steps else self._done / self._total
            self._bar.update(self._task, completed=share, text=self._text())
        elif self._total > self._every and (self._done % self._every == 0 or self._done == self._total):
            print(self._text(), file=sys.stderr, flush=True)

    def show(self, line: str) -> None:
        """Print a line of results to standard output, above the bar if both are on one terminal."""
        if self._bar is not None and sys.stdout.isatty():
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, flush=True)


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (BarColumn(bar_width=30), TextColumn("{task.fields[text]}"), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False)
