"""The command ``unigendet bench``: which benchmarks there are, and how a run of them goes.

Every module in ``BENCHMARKS`` has ``cases(device, size)``, which yields cases for the sizes "full", "quick" (seconds on
two cores) and "tiny" (to try the program itself). A case has an ``op``, a ``trace`` (or None), a ``title``, and
``run(run)``, which measures and adds its rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import signal
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import compare, environment, harness
from .contest import LostDevice, Run
from .progress import Progress
from .record import BENCHMARKS, SCHEMA, Record, table, write_json

SIZES = ("full", "quick", "tiny")
QUICK_SECONDS, FULL_SECONDS, GPU_SECONDS = 0.1, 1.0, 0.3
QUICK_LIMIT = 100.0  # seconds
SETS = {"full": None, "quick": 4, "tiny": 2}  # of buffers; None: as many as exceed the caches
COMPILES = ("torch.compile", "flex", "flex_mask_per_pack", "flex_flash4", "flex_cudnn", "block_mask_compiled")


@dataclass(frozen=True)
class Settings:
    """A run. ``ops`` are names of ops or benchmarks; ``ops``, ``traces``, ``backends``, ``directions`` None: all.

    ``out``: folder for ``<device>/<benchmark>.json``; None keeps nothing. ``seconds``: for one measurement of one
    candidate (default: by size). ``limit``: seconds after which nothing new is begun (default: 100 for "quick").
    ``whole``: ``ops`` are names of benchmarks only, each of which runs whole.
    """

    device: torch.device
    size: str = "full"
    ops: Collection[str] | None = None
    traces: Collection[str] | None = None
    backends: Collection[str] | None = None
    directions: Collection[str] | None = None
    out: Path | None = None
    seconds: float | None = None
    limit: float | None = None
    quiet: bool = False
    whole: bool = False

    @property
    def selection(self) -> dict[str, list[str]]:
        """What was asked for, if that was not everything."""
        wanted = {name: getattr(self, name) for name in ("ops", "traces", "backends", "directions")}
        return {name: sorted(value) for name, value in wanted.items() if value is not None}


@dataclass(frozen=True)
class Outcome:
    """What a run gave: ``content`` as in a file, rows with their ``benchmark``; whether it was interrupted."""

    content: dict[str, Any]
    interrupted: bool

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows."""
        return self.content["rows"]

    @property
    def failures(self) -> list[dict[str, Any]]:
        """Rows of ours that were wrong or failed."""
        return [r for r in self.rows if r["ours"] and (r.get("correct") is False or r["status"].startswith("failed"))]


def find_cases(settings: Settings) -> dict[str, list[Any]]:
    """The cases asked for, by benchmark. Raises ValueError if a name is unknown or nothing is left."""
    everything = {
        name: list(importlib.import_module(f"{__package__}.{name}").cases(settings.device, settings.size))
        for name in BENCHMARKS
    }
    flat = [case for cases in everything.values() for case in cases]
    _check("op", settings.ops, {*BENCHMARKS, *(case.op for case in flat)})
    _check("trace", settings.traces, {case.trace for case in flat if case.trace is not None})
    _check("backend", settings.backends, {name for case in flat for name in case.candidates})
    _check("direction", settings.directions, {name for case in flat for name in case.work})
    chosen = {name: [case for case in cases if _chosen(settings, name, case)] for name, cases in everything.items()}
    chosen = {name: cases for name, cases in chosen.items() if cases}
    if not chosen:
        raise ValueError("no benchmark fits all of --op, --trace, --backend and --direction together")
    return chosen


def _chosen(settings: Settings, benchmark: str, case: Any) -> bool:
    return (
        (settings.ops is None or not {benchmark, benchmark if settings.whole else case.op}.isdisjoint(settings.ops))
        and (settings.traces is None or case.trace in settings.traces)
        and (settings.backends is None or not set(case.candidates).isdisjoint(settings.backends))
        and (settings.directions is None or not set(case.work).isdisjoint(settings.directions))
    )


def _check(name: str, wanted: Collection[str] | None, known: set[str]) -> None:
    for value in wanted or ():
        if value not in known:
            raise ValueError(f"--{name} is {value!r}; here it must be one of {', '.join(sorted(known))}")


def run(settings: Settings) -> Outcome:
    """Run benchmarks. Ctrl-C and SIGTERM keep what is done."""
    cases = find_cases(settings)
    if settings.device.type == "cuda" and settings.device.index is not None:
        torch.cuda.set_device(settings.device)  # events and waits are of the current device
    limit = QUICK_LIMIT if settings.limit is None and settings.size == "quick" else settings.limit
    deadline = time.monotonic() + (float("inf") if limit is None else limit)
    header = _header(settings)
    records: list[Record] = []
    limits: dict[str, float] = {}
    interrupted = False
    with _terminated_as_interrupted(), Progress(sum(map(len, cases.values())), quiet=settings.quiet) as progress:
        progress.show(_heading(header))
        try:
            for name, own in cases.items():
                records.append(Record(_path(settings, name), name, header))
                _run_benchmark(settings, records[-1], own, progress, deadline, limits)
        except KeyboardInterrupt:
            progress.show(["", "Interrupted; what is done is kept."])
            interrupted = True
        except LostDevice as error:
            progress.show(["", f"Ended: {error}. What is done is kept."])
    rows = [{"benchmark": record.benchmark, **row} for record in records for row in record.rows]
    content = {"schema": SCHEMA, "benchmark": "all", **header, "ceilings": limits, "rows": rows}
    return Outcome({**content, "complete": all(r.complete for r in records) and not interrupted}, interrupted)


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, of a time limit or a batch system, as Ctrl-C; in the main thread, the only one that can be told so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run_benchmark(
    settings: Settings,
    record: Record,
    cases: Sequence[Any],
    progress: Progress,
    deadline: float,
    limits: dict[str, float],
) -> None:
    """Measure the ceilings, of which ``limits`` keeps the highest of a run, and run the cases of one benchmark."""
    seconds = 1.0 if settings.size == "full" else 0.1
    found = harness.ceilings(settings.device, tiny=settings.size == "tiny", seconds=seconds)
    limits.update({name: max(rate, limits.get(name, 0.0)) for name, rate in found.items()})
    record.header["ceilings"] = dict(limits)
    progress.show(_ceilings(limits))
    full = GPU_SECONDS if settings.device.type == "cuda" else FULL_SECONDS
    seconds = settings.seconds or (full if settings.size == "full" else QUICK_SECONDS)
    run = Run(
        record,
        settings.device,
        limits,
        progress,
        seconds=seconds if settings.size != "tiny" else 0.01,
        deadline=deadline,
        sets=SETS[settings.size],
        backends=settings.backends,
        directions=settings.directions,
        without=_left_out(settings),
    )
    complete = False
    try:
        for case in cases:
            _run_case(case, run)
        complete = not run.out_of_time
    finally:
        kept = record.close(complete=complete)
        if kept != record.path:
            progress.show(["", f"{record.path} holds an earlier complete run, and stays; this one: {kept}"])


def _run_case(case: Any, run: Run) -> None:
    run.progress.begin(case.title)
    try:
        case.run(run)
    except Exception as error:  # a case that cannot even be set up is a row, too
        common = {"op": case.op, "trace": case.trace, "shape": case.title, "dtype": "", "direction": ""}
        rows = [common | {"backend": "all", "ours": True, "status": harness.reason(error)}]
        run.progress.show(table(run.add(rows)))
        if isinstance(error, LostDevice):
            raise


def _left_out(settings: Settings) -> dict[str, str]:
    """Candidates that a quick or tiny run leaves out, unless they are asked for."""
    if settings.size == "full":
        return {}
    return {
        name: "left out of a quick run: it compiles for long"
        for name in COMPILES
        if name not in (settings.backends or ())
    }


def _header(settings: Settings) -> dict[str, Any]:
    chosen: dict[str, Any] = {"size": settings.size, "threads": torch.get_num_threads()}
    chosen |= {name: value for name in ("seconds", "limit") if (value := getattr(settings, name)) is not None}
    if settings.selection:
        chosen["selection"] = settings.selection
    return {"environment": environment.environment(settings.device), "ceilings": {}, "settings": chosen}


def _heading(header: Mapping[str, Any]) -> list[str]:
    device = header["environment"]["device"]
    processor = f", {device['processor']}" if device["processor"] else ""
    return [
        f"{device['name']}{processor}; PyTorch {header['environment']['versions']['torch']}, "
        f"{header['settings']['threads']} CPU threads"
    ]


def _ceilings(limits: Mapping[str, float]) -> list[str]:
    rates = f"{limits['matmul_tflops']:.3g} TFLOP/s (matrix product), {limits['copy_gbs']:.3g} GB/s (copy)"
    return ["", f"measured ceilings: {rates}"]


def _path(settings: Settings, benchmark: str) -> Path | None:
    if settings.out is None:
        return None
    return settings.out / environment.device_slug(environment.device_name(settings.device)) / f"{benchmark}.json"


def read_comparable(old: Path, settings: Settings) -> dict[tuple, compare.Row]:
    """The rows of an earlier run, which must have been on this machine with as many threads."""
    there, rows = compare.read_results(old)
    here = compare.machine(_header(settings))
    if there != here:
        raise ValueError(f"--compare {old} was measured on {there}; it must be this machine: {here}")
    return rows


def show_comparison(outcome: Outcome, old: Path, before: Mapping[tuple, compare.Row]) -> bool:
    """Print what differs from an earlier run, whose rows were in ``old``; whether anything became worse."""
    now = compare.keyed(outcome.rows)
    found = compare.differences(before, now)
    both = sum(1 for key, row in now.items() if row["ours"] and key in before)
    print(f"\nCompared with {old}: {both} rows of ours in both runs")
    for difference in found:
        print(f"  {difference}")
    if not found:
        print("  no difference beyond the noise")
    return any(d.is_regression for d in found)


def describe(settings: Settings) -> list[str]:
    """What there is to measure on this device, as lines."""
    lines = []
    for name, cases in find_cases(settings).items():
        lines.append(name)
        for case in cases:
            lines.append(f"  {case.title}: {', '.join(case.work)}")
            lines.append(f"    {', '.join(case.candidates)}")
    return lines


def bench(settings: Settings, *, json: Path | None = None, old: Path | None = None, record: bool = False) -> int:
    """The command. Returns 0; 1 if an answer of ours was wrong, failed, or became worse than ``old``; 130 interrupted.

    ``json``: file for all rows together; ``old``: results to compare with; ``record``: keep whole benchmarks in the
    checkout. Otherwise results and a report go to ``settings.out``.
    """
    if record:
        settings = _recording(settings)
    for name, path in (("json", json), ("out", settings.out)):
        _check_writable(name, path, folder=name == "out")
    # Before minutes are spent, and before the run writes to the same place.
    earlier = None if old is None else read_comparable(old, settings)
    outcome = run(settings)
    if json is not None:
        write_json(json, outcome.content)
        print(f"\nAll rows: {json}")
    _report(settings, record)
    for row in outcome.failures:
        what = "the answer is wrong" if row["status"] == "ok" else row["status"]
        print(f"  {row['op']} {row['direction']} {row['backend']}: {what}")
    worse = earlier is not None and show_comparison(outcome, old, earlier)
    return 130 if outcome.interrupted else int(worse or bool(outcome.failures))


def _check_writable(name: str, path: Path | None, *, folder: bool) -> None:
    if path is not None and path.exists() and path.is_dir() != folder:
        raise ValueError(
            f"--{name} is {path}, a {'file' if folder else 'folder'}; it must be a {'folder' if folder else 'file'}"
        )
    if path is not None:
        place = path.absolute() if folder else path.absolute().parent
        while not place.exists():
            place = place.parent
        if not place.is_dir() or not os.access(place, os.W_OK):
            raise ValueError(f"--{name} is {path}; {place} must be a folder that can be written to")


def _recording(settings: Settings) -> Settings:
    if not environment.is_checkout():
        raise ValueError("--record needs a checkout of the project; this is an installed package")
    partial = [name for name in settings.selection if name != "ops"]
    if settings.size != "full" or partial or not set(settings.ops or ()) <= set(BENCHMARKS):
        raise ValueError(
            "--record keeps whole benchmarks; it goes with none of --quick, --trace, --backend and --direction, and "
            f"--op must name benchmarks: {', '.join(BENCHMARKS)}"
        )
    return dataclasses.replace(settings, out=environment.RESULTS, whole=True)


def _report(settings: Settings, record: bool) -> None:
    if settings.out is None:
        return
    if record:
        print("\nRecorded. The documents follow with python -m benchmarks.report.")
        return
    from .report import write_report

    print(f"\nThe report: {write_report(settings.out, settings.out)}")
