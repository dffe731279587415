"""What the benchmarks of ops share: cases, candidates that take turns, judges, rows.

A case is an op on one set of shapes: random inputs, the useful work of each direction, and candidates, which are
functions of the inputs: backends of ours and peers. All candidates of a case are timed in turns on the same inputs.
Work counts what has to be computed and moved, whatever a candidate does besides; the floor of a call is the longer of
its operations at the machine's matmul rate and its bytes at the copy rate. Every result is compared with the definition
in float64 (``judge.py``): one that is wrong says so, and its speed counts for nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from .candidate import Candidate, Function, calls, dtype_name, outputs_and_gradients
from .harness import CannotRun, Timing, buffer_sets, first_call, measure_paired, peak_mib, reason, synchronize
from .judge import SUMMATION, Truth
from .progress import Progress
from .record import Record, table

OUT_OF_TIME = "the time limit of the run was reached"


@dataclass(frozen=True)
class Work:
    """Useful floating-point operations (of matrix products) and bytes that have to be moved."""

    flops: float = 0.0
    bytes: float = 0.0

    def columns(self, ms: float, ceilings: Mapping[str, float]) -> dict[str, Any]:
        """Rates, and the share of the time that the floor would take."""
        found: dict[str, Any] = {}
        floors = {}
        if self.flops:
            found |= {"flops": self.flops, "tflops": self.flops / ms / 1e9}
            floors["matmul"] = self.flops / ceilings["matmul_tflops"] / 1e9
        if self.bytes:
            found |= {"bytes": self.bytes, "gbs": self.bytes / ms / 1e6}
            floors["copy"] = self.bytes / ceilings["copy_gbs"] / 1e6
        if floors:
            found["bound"] = max(floors, key=floors.__getitem__)
            found["of_ceiling"] = floors[found["bound"]] / ms
        return found


class LostDevice(RuntimeError):
    """A kernel has left the device in a state in which every further call fails."""


@dataclass
class Run:
    """What all cases of a run share. ``deadline`` (time.monotonic) is when nothing new is begun any more."""

    record: Record
    device: torch.device
    ceilings: Mapping[str, float]
    progress: Progress
    seconds: float = 1.0
    deadline: float = float("inf")
    sets: int | None = None  # of buffers; default: as each case needs
    backends: Collection[str] | None = None  # of candidates; None: all
    directions: Collection[str] | None = None
    without: Mapping[str, str] = field(default_factory=dict)  # candidates that are left out, and why

    out_of_time: bool = False  # whether anything was left out for that

    def check_time(self) -> None:
        """Raise CannotRun once the time is over."""
        if time.monotonic() > self.deadline:
            self.out_of_time = True
            raise CannotRun(OUT_OF_TIME)

    def failure(self, error: Exception) -> str:
        """The status of a row for ``error``. Raises LostDevice if the device works no more, so that nothing would."""
        try:
            synchronize(self.device)
        except Exception as lost:
            raise LostDevice(f"the device works no more after this: {reason(error)}") from lost
        return reason(error)

    def wants(self, candidate: str) -> bool:
        """Whether rows of a candidate are asked for."""
        return self.backends is None or candidate in self.backends

    def add(self, rows: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
        """Keep rows; returns them."""
        self.record.add(rows)
        return rows


@dataclass(frozen=True)
class Case:
    """An op on one set of shapes.

    ``inputs(seed)`` gives tensors, those that require it with gradients wanted; ``work`` by direction ("forward",
    "backward", "both"), which also says what is measured; ``candidates`` by name what makes a candidate (or just its
    function), or raises CannotRun; ``peers`` are the candidates that are not ours; ``truth`` judges, from the inputs of
    seed 0 (None: nobody does); ``columns`` are more columns of every row.
    """

    op: str
    shape: str
    dtype: torch.dtype
    inputs: Callable[[int], tuple[Tensor, ...]]
    work: Mapping[str, Work]
    candidates: Mapping[str, Callable[[], Candidate | Function]]
    peers: frozenset[str]
    truth: Callable[[Case, tuple[Tensor, ...]], Truth] | None
    trace: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    sets: int | None = None  # of buffers; default: as many as exceed the caches by their size

    @property
    def title(self) -> str:
        """For people."""
        return " ".join(filter(None, (self.op, self.trace, self.shape, dtype_name(self.dtype))))

    def run(self, run: Run) -> None:
        """A row for each candidate and direction, whatever happens."""
        if time.monotonic() > run.deadline:
            run.progress.show(table(self._without_time(run)))
            return
        torch._dynamo.reset()  # compiled graphs of other cases count towards a limit
        inputs = [self.inputs(0)]
        size = sum(x.numel() * x.element_size() for x in inputs[0])
        inputs += [self.inputs(seed) for seed in range(1, run.sets or self.sets or buffer_sets(size, run.device))]
        # A compiled graph whose backward pass is timed alone must keep what it saved.
        with torch._functorch.config.patch(donated_buffer="backward" not in self.work):
            entries, failures = _entries(self, inputs[0], run)
            rows = []
            for direction in self.work:
                if run.directions is None or direction in run.directions:
                    rows += run.add(_rows(self, direction, entries, dict(failures), inputs, run))
                gc.collect()
        run.progress.show(table(rows))
        del entries, inputs
        free(run.device)

    def _without_time(self, run: Run) -> Sequence[dict[str, Any]]:
        run.out_of_time = True
        failures = dict.fromkeys(filter(run.wants, self.candidates), reason(CannotRun(OUT_OF_TIME)))
        directions = [d for d in self.work if run.directions is None or d in run.directions]
        return run.add([row for d in directions for row in _rows(self, d, {}, failures, (), run)])


@dataclass(frozen=True)
class Entry:
    """A candidate that ran, and what its first results were worth. ``errors`` None: nobody has judged, for ``why``."""

    candidate: Candidate
    first_call_s: float
    errors: Mapping[str, Mapping[str, float]] | None
    why: str | None = None


def _entries(case: Case, inputs: tuple[Tensor, ...], run: Run) -> tuple[dict[str, Entry], dict[str, str]]:
    """Call every candidate once and judge it; whoever fails is told why."""
    entries: dict[str, Entry] = {}
    failures: dict[str, str] = {}
    truth, judge = None, None
    run.progress.detail(case.title, "float64")
    try:
        truth = None if case.truth is None else case.truth(case, inputs)
    except Exception as error:  # say, out of memory: speed without a judge is shown as such
        judge = reason(error)
    for name in filter(run.wants, case.candidates):
        run.progress.detail(case.title, f"{name}, first call")
        try:
            run.check_time()
            if name in run.without:
                raise CannotRun(run.without[name])
            made, setup = first_call(case.candidates[name], run.device)
            candidate = made if isinstance(made, Candidate) else Candidate(made)
            results, seconds = first_call(lambda c=candidate: outputs_and_gradients(c, inputs), run.device)
            slack = SUMMATION if name in case.peers else 0.0
            errors = None if truth is None else truth.errors(results, slack)
            entries[name] = Entry(candidate, setup + seconds, errors, judge)
        except Exception as error:  # also of a peer's compiler, or out of memory: the next may still run
            failures[name] = run.failure(error)
    return entries, failures


def _rows(
    case: Case,
    direction: str,
    entries: Mapping[str, Entry],
    failures: dict[str, str],
    inputs: Sequence[tuple[Tensor, ...]],
    run: Run,
) -> list[dict[str, Any]]:
    peaks: dict[str, float | None] = {}

    def prepare(name: str) -> Sequence[Callable[[], Any]]:
        run.progress.detail(case.title, f"{direction}, {name}")
        run.check_time()
        made = calls(entries[name].candidate, inputs, direction)
        made[0]()  # compiles, where that waits for the first call
        peaks[name] = peak_mib(made[0], run.device)
        run.progress.detail(case.title, f"{direction}, in turns")
        return made

    measured = {}
    for name, (timing, columns) in race({n: functools.partial(prepare, n) for n in entries}, run, failures).items():
        # A mistake of ours in one direction, say, in the mask, may only be too small to be seen in the other.
        prefix = {"forward": "output", "backward": "gradient"}.get(direction, "") if name in case.peers else ""
        measured[name] = Measurement(dataclasses.asdict(timing), entries[name], peaks[name], prefix, columns)
    common = {"op": case.op, "trace": case.trace, "shape": case.shape, "dtype": dtype_name(case.dtype)}
    common |= {"direction": direction, **case.columns}
    names = [name for name in case.candidates if run.wants(name)]
    return make_rows(common, names, case.peers, measured, failures, case.work[direction], run.ceilings)


def race(
    candidates: Mapping[str, Callable[[], Sequence[Callable[[], Any]]]],
    run: Run,
    failures: dict[str, str],
    **options: Any,
) -> dict[str, tuple[Timing, dict[str, Any]]]:
    """Time candidates in turns, with more columns for their rows.

    ``candidates`` make each one's calls. If the memory does not hold all at once, or the turns fail otherwise, each is
    made and timed alone, which its row says (``paired``). Who fails goes to ``failures``. ``options`` are
    ``measure_paired``'s.
    """
    turns: dict[str, Sequence[Callable[[], Any]]] = {}
    try:
        for name, make in candidates.items():
            try:
                turns[name] = make()
            except torch.OutOfMemoryError:
                raise  # the others may be what fills the memory
            except Exception as error:
                failures[name] = run.failure(error)
        timings = measure_paired(turns, run.device, seconds=run.seconds, **options) if turns else {}
        return {name: (timing, {}) for name, timing in timings.items()}
    except Exception as error:
        run.failure(error)
    turns.clear()
    found = {}
    for name in [name for name in candidates if name not in failures]:
        free(run.device)
        try:
            timing = measure_paired({name: candidates[name]()}, run.device, seconds=run.seconds, **options)[name]
            found[name] = timing, {"paired": False}
        except Exception as error:
            failures[name] = run.failure(error)
    return found


def free(device: torch.device) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Measurement:
    """What came of a candidate: its timing, its entry, its peak memory, and which errors belong to the direction."""

    timing: Mapping[str, Any]
    entry: Entry
    peak_mib: float | None
    prefix: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)


def make_rows(
    common: Mapping[str, Any],
    names: Sequence[str],
    peers: Collection[str],
    measured: Mapping[str, Measurement],
    failures: Mapping[str, str],
    work: Work,
    limits: Mapping[str, float],
) -> list[dict[str, Any]]:
    """A row for every name, measured or failed. Only right answers are compared, and only with right ones."""
    # Where nobody judges by design, speed counts; where a judge failed, it does not.
    right = {name: _correct(m) or (m.entry.errors is None and m.entry.why is None) for name, m in measured.items()}
    rows = []
    for name in names:
        row = {**common, "backend": name, "ours": name not in peers}
        if name not in measured:
            rows.append(row | {"status": failures[name]})
            continue
        found = measured[name]
        ms = found.timing["ms"]
        errors = None if found.entry.errors is None else _errors(found)
        row |= {"status": "ok", **found.timing, "first_call_s": found.entry.first_call_s, "peak_mib": found.peak_mib}
        row |= {"correct": _correct(found), "error": errors, **work.columns(ms, limits), **found.columns}
        if found.entry.why is not None:
            row["not_judged"] = found.entry.why
        if name not in peers and right[name]:
            row["speedup_over"] = {p: measured[p].timing["ms"] / ms for p in names if p in peers and right.get(p)}
        rows.append(row)
    return rows


def _errors(found: Measurement) -> dict[str, Mapping[str, float]]:
    return {name: value for name, value in found.entry.errors.items() if name.startswith(found.prefix)}


def _correct(found: Measurement) -> bool | None:
    if found.entry.errors is None:
        return None
    return all(e["error"] <= e["allowed"] for e in _errors(found).values())
