"""How far a run has come: a progress bar where there is a terminal and rich, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO


class Progress:
    """A context manager. What ``show`` gets goes to ``out`` (default: standard output), progress to standard error.

    ``total``: cases of the run. ``quiet`` shows nothing at all.
    """

    def __init__(self, total: int, *, out: TextIO | None = None, quiet: bool = False) -> None:
        self._total, self._quiet, self._out = total, quiet, out or sys.stdout
        self._done, self._begin = 0, time.monotonic()
        self._bar: Any = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Progress:
        if not self._quiet and sys.stderr.isatty() and importlib.util.find_spec("rich"):
            self._bar = self._stack.enter_context(_rich_bar())
            self._task = self._bar.add_task("", total=self._total, text="")
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def begin(self, case: str) -> None:
        """The next case has begun."""
        self._done += 1
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done - 1, text=case, refresh=True)
        elif not self._quiet:
            seconds = time.monotonic() - self._begin
            print(f"[{self._done}/{self._total}, {seconds:.0f} s] {case}", file=sys.stderr, flush=True)

    def detail(self, case: str, text: str) -> None:
        """What is being done within a case; shown by a bar only."""
        if self._bar is not None:
            self._bar.update(self._task, text=f"{case}: {text}", refresh=True)

    def show(self, lines: Sequence[str]) -> None:
        """Print lines of results, above the bar if there is one."""
        if self._quiet:
            return
        if self._bar is not None and self._out is sys.stdout and sys.stdout.isatty():
            for line in lines:
                self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print("\n".join(lines), file=self._out, flush=True)


def _rich_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[text]}"))
    # It moves when it is told to: a thread of its own would run beside what is being measured.
    return Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False, auto_refresh=False)
