"""What a run tells: its history, metric files (JSON lines, TensorBoard), and a progress bar or plain lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from unigendet.files import make_folder, naming, sync, write_text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch.utils.tensorboard import SummaryWriter

    from unigendet.training.tracking import Tracker

METRICS_FILE = "metrics.jsonl"
RATES = ("tokens_per_second", "samples_per_second", "model_tflops_per_second", "mfu")
MEMORY = ("memory_gib", "memory_reserved_gib")  # the largest in a step
SUMS = ("tokens", "samples")
SECONDS = ("seconds", "data_seconds", "encode_seconds")
TIMING = (*SECONDS, *RATES, *MEMORY)  # entries of a row that differ from run to run
AROUND = ("step", *SUMS, "lr", "grad_norm", *TIMING)  # entries that are no losses
SHORTEST = 1e-9  # seconds that steps take at least: they are divided by

Row = dict[str, Any]


@dataclass(frozen=True)
class Look:
    """What was seen of a model after step ``step`` of its training.

    ``scores`` by name, without those that are undefined; ``samples``: a picture uint8 [H, W, 4], RGBA, if there is
    one; ``text``: for the progress display.
    """

    step: int
    scores: Mapping[str, float]
    samples: NDArray[np.uint8] | None
    text: str


def mean_row(rows: Iterable[Mapping[str, Any]]) -> Row:
    """The mean of every number over the rows that have it.

    But ``step`` is the last one's, ``SUMS`` are sums, ``RATES`` those over the whole time, ``MEMORY`` is the largest.
    """
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    mean: Row = {}
    for name in names:
        having = [row for row in rows if name in row]
        values = [row[name] for row in having]
        if name in RATES:
            seconds = [row["seconds"] for row in having]
            mean[name] = sum(v * s for v, s in zip(values, seconds, strict=True)) / max(sum(seconds), SHORTEST)
        elif name in MEMORY:
            mean[name] = max(values)
        else:
            mean[name] = sum(values) if name in SUMS else sum(values) / len(values)
    if rows:
        mean["step"] = rows[-1]["step"]
    return mean


def read_history(folder: str | Path, last_step: int | None = None, name: str = METRICS_FILE) -> list[Row]:
    """The rows of a run's metric file ``name``, up to ``last_step``; none if there is no such file.

    A damaged last line is left out: the run was stopped while it wrote it.

    Raises:
        ValueError: another line is no row; names the file and the line.
    """
    file = Path(folder) / name
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            step = row["step"]
            keep = last_step is None or step <= last_step
        except (ValueError, TypeError, KeyError) as error:  # not JSON; no mapping; without a step
            if number == len(lines):
                break
            raise ValueError(f"{file}, line {number} is {line[:80]!r}; it must be a step's row as JSON") from error
        if keep:
            rows.append(row)
    return rows


class MetricsWriter:
    """Writes every step's row to ``metrics.jsonl``, and interval means as TensorBoard events and to a tracker.

    A row is handed to the operating system as it is added, so that it outlives a process that ends without notice.

    Args:
        folder: where to; None writes nothing.
        history: the rows of earlier steps when a run goes on; what the file holds beyond them is dropped. The file is
            the old one or the new one at every instant.
        tracker: gets what TensorBoard gets.

    Raises:
        OSError: from every method, when a file cannot be written; names it.
    """

    def __init__(self, folder: str | Path | None, history: Iterable[Row] = (), tracker: Tracker | None = None) -> None:
        self._file, self._tracker = None, tracker
        self._events: SummaryWriter | None = None
        if folder is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        history = list(history)
        self._path, self._folder = Path(folder) / METRICS_FILE, Path(folder) / "tensorboard"
        make_folder(Path(folder))
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in history))
        self._file = self._path.open("a", encoding="utf-8", buffering=1)  # by line
        first = history[-1]["step"] + 1 if history else 0
        with naming(self._folder):
            self._events = SummaryWriter(str(self._folder), purge_step=first)

    def add(self, row: Row) -> None:
        """Append one step's row."""
        if self._file is not None:
            with naming(self._path):
                self._file.write(json.dumps(row) + "\n")

    def flush(self) -> None:
        """Hand the events so far to the operating system; the rows have been."""
        if self._events is not None:
            with naming(self._folder):
                self._events.flush()

    def sync(self) -> None:
        """Bring the rows so far onto the disk: a checkpoint that is about to be written counts on them."""
        if self._file is not None:
            self.flush()
            sync(self._path)

    def log(self, row: Row) -> None:
        """Write an interval's mean as events, and ``flush``."""
        self._scalars("train", {name: value for name, value in row.items() if name not in ("step", *SUMS)}, row["step"])
        self.flush()

    def look(self, look: Look) -> None:
        """Write what was seen of the model as events, and ``flush``."""
        self._scalars("watch", look.scores, look.step)
        if look.samples is not None:
            if self._events is not None:
                with naming(self._folder):
                    self._events.add_image("watch/samples", look.samples, look.step, dataformats="HWC")
            if self._tracker is not None:
                self._tracker.picture("watch/samples", look.samples, look.step)
        self.flush()

    def _scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        named = {f"{group}/{name}": value for name, value in values.items()}
        if self._events is not None:
            with naming(self._folder):
                for name, value in named.items():
                    self._events.add_scalar(name, value, step)
        if self._tracker is not None:
            self._tracker.scalars(named, step)

    def close(self, *, failed: bool = False) -> None:
        """Finish the files; ``failed``: because an error ended the run."""
        if self._file is not None:
            with naming(self._path):
                self._file.close()
        if self._events is not None:
            with naming(self._folder):
                self._events.close()
        if self._tracker is not None:
            self._tracker.close(failed=failed)


class ProgressDisplay:
    """A progress bar on a terminal, one plain line per interval elsewhere. A context manager.

    Args:
        title: in front of everything.
        total: steps of the run.
        start: steps already done.
        console: where to; default: standard error. ``quiet`` shows nothing.
        quiet: show nothing.
    """

    def __init__(
        self, title: str, total: int, start: int = 0, console: Console | None = None, *, quiet: bool = False
    ) -> None:
        self._title, self._total, self._quiet = title, total, quiet
        self._console = console or Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
        )
        shown = self._console.is_terminal and not quiet
        self._bar = Progress(*columns, console=self._console) if shown else None
        self._task = self._bar.add_task(title, total=total, completed=start, text="") if self._bar else None
        self._losses = self._seen = ""

    def __enter__(self) -> ProgressDisplay:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, step: int) -> None:
        """Show that ``step`` steps are done."""
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=step)

    def log(self, row: Row) -> None:
        """Show an interval's mean."""
        self._losses = describe(row)
        self._show(row["step"], self._losses)

    def look(self, look: Look) -> None:
        """Show what was seen of the model; a progress bar goes on showing the last of it."""
        self._seen = look.text
        self._show(look.step, look.text)

    def _show(self, step: int, text: str) -> None:
        if self._bar and self._task is not None:
            self._bar.update(self._task, text="  ".join(filter(None, (self._losses, self._seen))))
        elif not self._quiet:
            line = f"{self._title}  step {step}/{self._total}  {text}"
            self._console.print(line, soft_wrap=True, highlight=False, markup=False)


def describe(row: Row) -> str:
    """The loss, its terms, the throughput, and what is known of the device's use, as one line."""
    words = [f"{name} {value:.4f}" for name, value in row.items() if name not in AROUND]
    words.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    if "mfu" in row:
        words.append(f"{row['mfu']:.1%} MFU")
    if "memory_gib" in row:
        words.append(f"{row['memory_gib']:.1f} GiB")
    return "  ".join(words)
