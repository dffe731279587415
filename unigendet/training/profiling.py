"""Profiles of a few training steps, on request: a trace for chrome://tracing or Perfetto, and a table of operations."""

from __future__ import annotations

import gzip
import shutil
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile, record_function

from unigendet.files import make_folder, naming, whole_file, write_text
from unigendet.training.config import ProfileConfig

FOLDER = "profile"
ROWS = 40  # of the table


class StepProfiler:
    """Profiles the steps that ``config`` names, as far as this process takes them, and what happens between them.

    In the run's output folder it leaves ``profile/step-000010.json.gz``, the trace, named after its first step, and
    ``profile/step-000010.txt``, the operations that took longest; with several processes, ``-rank-3`` behind the step.
    In the trace each step is a span ``step 10``. The step before the first one warms the profiler up, if there is one.

    Args:
        config: of the run; ``start`` None profiles nothing, at no cost.
        output: folder of the run.
        device: that the process computes on.
        rank: of the process.
        world_size: number of processes.
    """

    def __init__(
        self, config: ProfileConfig, output: str | Path | None, device: torch.device, rank: int = 0, world_size: int = 1
    ) -> None:
        self._wanted = range(0) if config.start is None else range(config.start, config.start + config.steps)
        self._memory, self._on_cuda = config.memory, device.type == "cuda"
        self._folder, self._suffix = Path(output or ".") / FOLDER, f"-rank-{rank}" if world_size > 1 else ""
        self._profile: profile | None = None
        self._span: record_function | None = None
        self._first = 0

    def begin(self, step: int) -> None:
        """Before step ``step``, numbered from 1, and the wait for its batch."""
        if self._profile is None:
            if step not in self._wanted and step + 1 not in self._wanted[:1]:
                return
            self._open(step)
        else:
            self._profile.step()
        if step in self._wanted:
            self._span = record_function(f"step {step}")
            self._span.__enter__()

    def end(self, step: int) -> None:
        """After step ``step``. Raises OSError if a file cannot be written; names it."""
        self._leave_span()
        if step in self._wanted[-1:]:
            self.close()

    def close(self) -> None:
        """End a profile that is under way and write what it has. Raises OSError, see ``end``."""
        running, self._profile = self._profile, None
        if running is not None:
            self._leave_span()
            running.stop()

    def _open(self, step: int) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_cuda else [])]
        self._first = max(step, self._wanted[0])
        warm_up = self._first - step

        def schedule(number: int) -> ProfilerAction:
            return ProfilerAction.WARMUP if number < warm_up else ProfilerAction.RECORD

        self._profile = profile(
            activities=activities, schedule=schedule, on_trace_ready=self._write, profile_memory=self._memory
        )
        self._profile.start()

    def _leave_span(self) -> None:
        if self._span is not None:
            self._span.__exit__(None, None, None)
            self._span = None

    def _write(self, made: profile) -> None:
        make_folder(self._folder)
        stem = self._folder / f"step-{self._first:06}{self._suffix}"
        longest = f"self_{'cuda' if self._on_cuda else 'cpu'}_time_total"
        write_text(f"{stem}.txt", made.key_averages().table(sort_by=longest, row_limit=ROWS))
        with naming(self._folder), tempfile.TemporaryDirectory(prefix=".trace-", dir=self._folder) as temporary:
            trace = Path(temporary) / "trace.json"
            made.export_chrome_trace(str(trace))
            with whole_file(f"{stem}.json.gz") as path, trace.open("rb") as plain, gzip.open(path, "wb") as packed:
                shutil.copyfileobj(plain, packed)
