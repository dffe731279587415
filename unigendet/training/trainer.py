"""The training loop: AdamW over what the stage trains, warm-up, clipping, averaged weights, metrics, checkpoints.

Nothing is swallowed: an error in a batch stops the run, and so does a loss that is not finite, before it reaches the
weights. With several processes (``parallel.py``) each has batches of its own, and the losses and gradients are those of
all of them together.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import logging
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from unigendet.device import device_name
from unigendet.model.shards import CheckpointError
from unigendet.model.unigendet import UniGenDet
from unigendet.training.config import SKIPS, OptimizerConfig, TrainConfig
from unigendet.training.metrics import Look, MetricsWriter, ProgressDisplay, Row, mean_row, read_history
from unigendet.training.parallel import Parallel, stopping_signal
from unigendet.training.profiling import StepProfiler
from unigendet.training.record import record_start
from unigendet.training.signals import StopSignals
from unigendet.training.stages import Stage
from unigendet.training.state import (
    ExponentialAverage,
    TrainState,
    checkpoints,
    loader_position,
    restore_position,
)
from unigendet.training.step import Gradients, StepValues, compile_layers, slot_generators
from unigendet.training.throughput import Meter, combine
from unigendet.training.tracking import open_tracker

logger = logging.getLogger(__name__)

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk, quota, largest file


class TrainingError(RuntimeError):
    """Training cannot go on; the message names the step and, where a batch is the cause, its samples."""


class SaveError(OSError):
    """A run had to stop because a file could not be written; the message says which, and how to go on."""


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves: ``history``, one row per step, and the folder of the last checkpoint, if any was written.

    ``stopped_by``: the signal because of which it ended before its last step.

    A row has ``step`` (from 1), ``loss``, the unweighted loss terms by name, ``grad_norm`` before clipping, ``lr``,
    ``tokens``, ``samples``, ``seconds``, of them ``data_seconds`` (the wait for data) and, where the loader has an
    autoencoder to run, ``encode_seconds`` (that and packing, see ``Loader``); ``tokens_per_second``,
    ``samples_per_second`` and ``model_tflops_per_second`` (useful operations); ``mfu``, their share of the device's
    peak, where that is known; on CUDA ``memory_gib`` and ``memory_reserved_gib``, the step's peaks (``throughput``).
    Losses, tokens and the like are those of all processes. A skipped step's row has ``skipped`` 1, and no number that
    is not finite.
    """

    model: UniGenDet
    history: list[Row]
    step: int
    checkpoint: Path | None = None
    stopped_by: signal.Signals | None = None


def learning_rate(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """The rate of step ``step``, counted from 0: linear warm-up, then constant, or half a cosine to final_lr · lr."""
    warmup = config.warmup(total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    done = (step - warmup) / max(1, total_steps - warmup)
    return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))


class Trainer:
    """Trains ``stage.model``.

    Args:
        stage: what learns and from which losses.
        batches: yields the stage's batches, endlessly or at least as many as there are steps. A ``Loader`` also has
            ``state_dict``, and its position is then saved and restored; other iterables start anew on resuming. Of its
            ``encode_seconds`` each row has those of its step.
        config: of the run. Its model, datasets and loader are not read here.
        companions: each writes its files beside the weights of every checkpoint, say a tokenizer's ``save``.
        parallel: this process among those of the run; default: the only one, on the model's device.
        watch: called with the state before the first step and after each one, once its checkpoint is written; what it
            returns is recorded and shown. It must leave the state as it is. Its time counts for no step. Its second
            argument says whether a signal has come, upon which it should return None soon.
        console: where progress goes; default: standard error.
        quiet: show no progress.
    """

    def __init__(
        self,
        stage: Stage,
        batches: Iterable[Any],
        config: TrainConfig,
        *,
        companions: Sequence[Callable[[Path], None]] = (),
        parallel: Parallel | None = None,
        watch: Callable[[TrainState, Callable[[], bool]], Look | None] | None = None,
        console: Console | None = None,
        quiet: bool = False,
    ) -> None:
        self.stage, self.batches, self.config, self._companions = stage, batches, config, companions
        self.parallel = Parallel(device=stage.model.device) if parallel is None else parallel
        self._watch, self._console, self._quiet = watch, console, quiet or not self.parallel.main
        model, optimizer = stage.model, config.optimizer
        model.decoder.recompute = model.vision.recompute = config.recompute
        if config.compile:
            compile_layers(model)
        self.device = self.parallel.device
        self._gradients = Gradients(stage, config, self.parallel)
        self._meter = Meter(stage, self.device, config.peak_tflops)
        ranks = (self.parallel.rank, self.parallel.world_size)
        self._profiler = StepProfiler(config.profile, config.output, self.device, *ranks)
        self.state = TrainState(
            model=model,
            stage=stage,
            optimizer=torch.optim.AdamW(
                list(stage.trained.values()),
                lr=optimizer.lr,
                betas=optimizer.betas,
                eps=optimizer.eps,
                weight_decay=optimizer.weight_decay,
                fused=True,
            ),
            ema=None if config.ema_decay is None else ExponentialAverage(stage.trained, config.ema_decay),
            generators=slot_generators(config.seed, self.parallel, config.accumulate),
            parallel=self.parallel,
        )
        self.history: list[Row] = []
        self._resumed: Path | None = None
        self._skipped = 0  # steps in a row

    @property
    def ema(self) -> ExponentialAverage | None:
        """The averaged weights."""
        return self.state.ema

    def run(self, until: int | None = None, *, stop: StopSignals | None = None) -> TrainResult:
        """Train up to step ``until``, by default ``config.total_steps``, and write the last checkpoint.

        ``stop``: end after the step in which it receives a signal, with a checkpoint as at the end; a look at the model
        is left for it, but for the one after the run's last step.

        Raises:
            TrainingError: a loss or gradient is not finite, or the batches end too early.
            SaveError: a checkpoint or the metrics could not be written. The checkpoints before it are whole.
            ValueError: ``until`` lies beyond the run, or ``run.json`` is damaged.
            ModuleNotFoundError, RuntimeError: see ``open_tracker``.
        """
        total = self.config.total_steps
        until = total if until is None else until
        if not self.state.step <= until <= total:
            raise ValueError(f"until is {until}; it must be in {self.state.step}..{total}, steps done to total_steps")
        with self._explained():
            writer = self._writer()
        try:
            with ProgressDisplay(self.stage.name, total, self.state.step, self._console, quiet=self._quiet) as display:
                self._loop(until, writer, display, stop or StopSignals())
            with self._explained():
                self.state.saving.wait()
        except BaseException as error:
            self.parallel.failing(error, self.state.saving.running)
            with suppress(Exception):  # what stopped the run counts
                self.state.saving.wait()
            for finish in (self._profiler.close, functools.partial(writer.close, failed=True)):
                with suppress(OSError):
                    finish()
            raise
        with self._explained():
            self._profiler.close()
            writer.close()
        stopped_by = None
        if stop is not None and self.state.step < until:
            stopped_by = stopping_signal(stop.received)
        return TrainResult(self.state.model, self.history, self.state.step, self._last_checkpoint(), stopped_by)

    def _writer(self) -> MetricsWriter:
        """What writes the metrics: of several processes in the first one only, which also records the start."""
        config, step = self.config, self.state.step
        devices = self.parallel.gather(device_name(self.device))
        if not self.parallel.main:
            return MetricsWriter(None)
        record_start(config, devices, step=step, resumed=self._resumed)
        return MetricsWriter(config.output, self.history, open_tracker(config, step))

    def _loop(self, until: int, writer: MetricsWriter, display: ProgressDisplay, stop: StopSignals) -> None:
        batches = iter(self.batches)
        shown, saved = len(self.history), self.state.step
        self.state.model.train()
        self._look(writer, display, stop)
        stopping = self._stopping(stop)
        while self.state.step < until and not stopping:
            self._profiler.begin(self.state.step + 1)
            self._meter.begin()
            step_batches, waited, encoded = self._take(batches)
            row = self.train_step(*step_batches, waited=waited, encoded=encoded)
            display.advance(row["step"])
            stopping = self._stopping(stop)
            last = row["step"] == until or stopping
            with self._explained():
                self._profiler.end(row["step"])
                writer.add(row)
            if last or row["step"] % self.config.log_every == 0:
                mean = mean_row(self.history[shown:])
                shown = len(self.history)
                with self._explained():
                    writer.log(mean)
                display.log(mean)
            if last or (self.config.save_every and row["step"] % self.config.save_every == 0):
                saved = self._checkpoint(writer)
            self._look(writer, display, stop)
            stopping = self._stopping(stop)
        if saved != self.state.step:  # the signal came during the look, or after it
            self._checkpoint(writer)

    def _stopping(self, stop: StopSignals) -> bool:
        """Whether all processes end now: one has had a signal, or a checkpoint could not be written."""
        return self.parallel.any(stop.received is not None or self.state.saving.failed)

    def _look(self, writer: MetricsWriter, display: ProgressDisplay, stop: StopSignals) -> None:
        """Look, unless a signal asks to end: the run looks when it goes on, and where it is complete, all the same."""
        complete = self.state.step == self.config.total_steps

        def ends() -> bool:  # asked by all processes at once: they look in step
            return self.parallel.any(stop.received is not None) and not complete

        if self._watch is None or ends():
            return
        with self._explained():
            look = self._watch(self.state, ends)
            if look is not None:
                writer.look(look)
        if look is not None:
            display.look(look)

    def _checkpoint(self, writer: MetricsWriter) -> int:
        """Save; returns the step. A run that is killed later must find the metrics up to its checkpoint."""
        with self._explained():
            writer.sync()
            self.save()
        return self.state.step

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Within it, a file that cannot be written is a SaveError that says how to go on."""
        try:
            yield
        except OSError as error:
            remedy = "make room" if error.errno in _NO_ROOM else "put that right"
            what = f"cannot write {error.filename or self.config.output} ({error.strerror or error})"
            last = self._last_checkpoint()
            if last is None and (first := self._resumed) is not None:
                how = f"no checkpoint has been written yet: {remedy}, then go on again from {first} (--resume {first})"
            elif last is None:
                how = f"no checkpoint has been written yet: {remedy}, then start the run again"
            else:
                how = f"the last good checkpoint is {last}: {remedy}, then resume the run (--resume)"
            raise SaveError(f"after step {self.state.step}: {what}; {how}") from error

    def _take(self, batches: Iterator[Any]) -> tuple[list[Any], float, float | None]:
        """A step's batches, the seconds that were waited for them, and those that it took to encode them, if any."""
        started, before = time.perf_counter(), getattr(self.batches, "encode_seconds", None)
        taken = [self._next(batches) for _ in range(self.config.accumulate)]
        seconds = time.perf_counter() - started
        if before is None:
            return taken, seconds, None
        encoded = self.batches.encode_seconds - before
        return taken, max(seconds - encoded, 0.0), encoded

    def _next(self, batches: Iterator[Any]) -> Any:
        try:
            return next(batches)
        except StopIteration:
            raise TrainingError(
                f"the batches ended after step {self.state.step} of {self.config.total_steps}"
            ) from None

    def train_step(self, *batches: Any, waited: float = 0.0, encoded: float | None = None) -> Row:
        """One step on ``config.accumulate`` batches of this process: forward, backward, update.

        Returns the step's row, which also joins the history. ``waited``, ``encoded``: seconds that the batches took to
        come, and to be encoded in this process, if they were.
        """
        state, config = self.state, self.config
        started = time.perf_counter()
        lr = learning_rate(state.step, config.optimizer, config.total_steps)
        self.stage.progress = state.step / config.total_steps
        found = self._gradients.compute(batches, state.generators, state.step + 1)
        row = {"step": state.step + 1, **found.values, "lr": lr}
        bad = found.not_finite()
        if bad:
            row = self._not_finite(row, found, bad)
        else:
            self._skipped = 0
            for group in state.optimizer.param_groups:
                group["lr"] = lr
            state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        if state.ema is not None and not bad:
            state.ema.update()
        state.step += 1
        seconds = time.perf_counter() - started + waited + (encoded or 0.0)
        row |= combine(self.parallel.gather(self._meter.measure(batches, seconds, waited, encoded)))
        self.history.append(row)
        return row

    def _not_finite(self, row: Row, found: StepValues, bad: str) -> Row:
        """Stop the run, or skip the step: its row without what is not finite. Names the samples."""
        what, samples = f"step {row['step']} is not finite ({bad})", found.suspects(self.parallel)
        self._skipped += 1
        if self.config.on_nonfinite == "stop":
            raise TrainingError(f"{what}; the weights are those of step {self.state.step}. {samples}")
        if self._skipped >= SKIPS:
            raise TrainingError(f"{what}, like the {SKIPS - 1} steps before it, which were skipped. {samples}")
        if self.parallel.main:
            logger.warning("%s: skipped. %s", what, samples)
        return {name: value for name, value in row.items() if math.isfinite(value)} | {"skipped": 1}

    def save(self) -> Path | None:
        """Write a checkpoint of the present step and remove old ones; None without an output folder.

        Several processes go on while it is written; the next save, or the end of ``run``, waits for it.
        """
        if self.config.output is None:
            return None
        settings, position = dataclasses.asdict(self.config), loader_position(self.batches, self.parallel)
        options = {"keep": self.config.keep_checkpoints, "companions": self._companions}
        return self.state.save(self.config.output, position=position, settings=settings, **options)

    def resume(self, path: str | Path) -> None:
        """Go on from a checkpoint folder, exactly as if training had never stopped.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            CheckpointError: it does not fit this run.
        """
        restore_position(self.batches, self.state.load(path), path)
        if self.state.step > self.config.total_steps:
            raise CheckpointError(
                f"checkpoint {path} is at step {self.state.step}; total_steps is {self.config.total_steps}"
            )
        self.history = [] if self.config.output is None else read_history(self.config.output, self.state.step)
        self._resumed = Path(path)
        if self.state.step == self.config.total_steps and not self._quiet:
            logger.warning(
                "checkpoint %s is of step %d, the last of the run: nothing is left to train; with a larger total_steps "
                "it goes on, by the schedules of that many steps", path, self.state.step,
            )  # fmt: skip

    def _last_checkpoint(self) -> Path | None:
        found = checkpoints(self.config.output) if self.config.output is not None else []
        return found[-1] if found else None
