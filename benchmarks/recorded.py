"""Recorded benchmark results: reading a folder of them, and picking from their rows what a report shows.

A folder holds ``<device>/<benchmark>.json``. Files that cannot be read, or have another schema, are listed by name and
never passed over. Rows are the dictionaries of the files, rows that did not run among them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .environment import kernels_hash, short_commit
from .record import BENCHMARKS, OPS, SCHEMA

OTHER_RECORDS = ("quickstart",)  # folders beside the devices' that hold no benchmark of speed
SIZED = ("decoder_layer", "gduf_step", "diga_step")  # the size of the model is part of their cases' names
HEADLINE_TRACE = "gduf_32k"  # stands for an op where it was measured on it, else the op's first case does

_HEADER = {"benchmark": str, "environment": dict, "ceilings": dict, "settings": dict, "complete": bool, "rows": list}
_ROW = ("op", "trace", "shape", "dtype", "direction", "backend", "ours", "status")
_TIMED = ("ms", "p20", "p80", "correct")

Row = Mapping[str, Any]


def ran(row: Row) -> bool:
    """Whether the row has a time."""
    return row["status"] == "ok"


def wrong(row: Row) -> bool:
    """Whether the row's answer was judged and found wrong."""
    return ran(row) and row.get("correct") is False


def usable(row: Row) -> bool:
    """Whether the row's time may be compared: it ran, was not found wrong, and its judge did not fail."""
    return ran(row) and not wrong(row) and "not_judged" not in row


@dataclass(frozen=True)
class Case:
    """Rows that did the same by different backends. ``label``: the trace, the shape, or both if one is too little."""

    op: str
    label: str
    dtype: str
    direction: str
    rows: tuple[Row, ...]

    @property
    def trace(self) -> str | None:
        """The standard pack, if the case is one."""
        return self.rows[0]["trace"]

    @property
    def shape(self) -> str:
        """The sizes in words."""
        return self.rows[0]["shape"]

    def best(self) -> Row | None:
        """The fastest of our rows that may be compared."""
        return min((row for row in self.rows if row["ours"] and usable(row)), key=lambda row: row["ms"], default=None)

    def speedups(self, row: Row) -> dict[str, float]:
        """What a row of ours gains over each peer; nothing over a peer that was wrong, nor if the row itself was."""
        unfit = {peer["backend"] for peer in self.rows if not peer["ours"] and not usable(peer)}
        recorded = row.get("speedup_over") or {} if row["ours"] and usable(row) else {}
        return {peer: factor for peer, factor in recorded.items() if peer not in unfit}

    def row_of(self, backend: str) -> Row | None:
        """The row of a backend."""
        return next((row for row in self.rows if row["backend"] == backend), None)


@dataclass(frozen=True)
class Result:
    """One file."""

    benchmark: str
    environment: Mapping[str, Any]
    ceilings: Mapping[str, float]
    settings: Mapping[str, Any]
    complete: bool
    stale: bool  # measured with other kernels than the present ones
    rows: tuple[Row, ...]

    @property
    def commit(self) -> str:
        """The abbreviated commit, and whether files differed from it."""
        return short_commit(self.environment)

    def cases(self) -> list[Case]:
        """The rows by what they did, in the file's order."""
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in self.rows:
            key = tuple(row[name] for name in ("op", "trace", "shape", "dtype", "direction"))
            groups.setdefault(key, []).append(row)
        shapes: dict[tuple[Any, ...], set[str]] = {}
        for op, trace, shape, *_ in groups:
            shapes.setdefault((op, trace), set()).add(shape)
        cases = []
        for (op, trace, shape, dtype, direction), rows in groups.items():
            label = trace or shape
            if trace and (len(shapes[op, trace]) > 1 or op in SIZED):
                label = f"{trace}, {shape}"
            cases.append(Case(op, label, dtype, direction, tuple(rows)))
        return cases


@dataclass(frozen=True)
class Device:
    """What was recorded on one kind of machine, by benchmark."""

    slug: str
    results: Mapping[str, Result]

    @property
    def hardware(self) -> Mapping[str, Any]:
        """Name and, of a GPU, capability, multiprocessors, memory and driver."""
        return next(iter(self.results.values())).environment["device"]

    @property
    def name(self) -> str:
        """What the device calls itself."""
        return self.hardware["name"]

    @property
    def is_gpu(self) -> bool:
        """Whether it is a CUDA device."""
        return "capability" in self.hardware

    @property
    def is_hopper(self) -> bool:
        """Whether it is of the class of the H100 and H200, for which the targets are set."""
        return str(self.hardware.get("capability", "")).startswith("9.")

    def headlines(self) -> list[tuple[Result, Case]]:
        """For every op the cases that stand for it: one pack or shape, forward and backward or both at once."""
        chosen = []
        for name in (*OPS, "decoder_layer"):
            if name in self.results:
                cases = [case for case in self.results[name].cases() if any(row["ours"] for row in case.rows)]
                for op in dict.fromkeys(case.op for case in cases):
                    chosen += [(self.results[name], case) for case in _headline([c for c in cases if c.op == op])]
        return chosen

    def steps(self) -> list[tuple[Result, Case]]:
        """For every training step its largest configuration."""
        if (result := self.results.get("training_step")) is None:
            return []
        largest: dict[str, Case] = {}
        for case in result.cases():
            if case.op not in largest or _work(case) > _work(largest[case.op]):
                largest[case.op] = case
        return [(result, case) for case in largest.values()]


@dataclass(frozen=True)
class Recorded:
    """A folder of results: its devices, GPUs of the class of the H100 first, CPUs last, and what could not be read."""

    devices: tuple[Device, ...]
    unreadable: Mapping[str, str]  # file → why

    def of_class(self, hopper: bool) -> list[Device]:
        """The GPUs of the class of the H100, or the CPUs."""
        return [device for device in self.devices if (device.is_hopper if hopper else not device.is_gpu)]


def load(folder: Path, kernels_sha256: str | None = None) -> Recorded:
    """Read all results in ``folder``; those of other kernels than ``kernels_sha256`` (default: the present) are stale.

    A folder that is not there holds nothing.
    """
    current = kernels_sha256 or kernels_hash()
    devices, unreadable = [], {}
    for place in sorted(path for path in folder.glob("*") if path.is_dir() and path.name not in OTHER_RECORDS):
        found = {}
        for file in sorted(place.glob("*.json")):
            try:
                result = read(file, current)
                found[result.benchmark] = result
            except ValueError as error:
                unreadable[f"{place.name}/{file.name}"] = str(error)
        if found:
            order = sorted(found, key=lambda name: BENCHMARKS.index(name) if name in BENCHMARKS else len(BENCHMARKS))
            devices.append(Device(place.name, {name: found[name] for name in order}))
    devices.sort(key=lambda device: (not device.is_hopper, not device.is_gpu, device.slug))
    return Recorded(tuple(devices), unreadable)


def read(file: Path, kernels_sha256: str) -> Result:
    """One file. Raises ValueError that says what is wrong with it."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"it is no JSON: {error}") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        schema = data.get("schema") if isinstance(data, dict) else None
        raise ValueError(f"its schema is {schema}; it must be {SCHEMA}")
    for name, kind in _HEADER.items():
        if not isinstance(data.get(name), kind):
            raise ValueError(f"its {name!r} must be a {kind.__name__}")
    if data["benchmark"] != file.stem:
        raise ValueError(f"its benchmark is {data['benchmark']!r}; the file's name says {file.stem!r}")
    if "name" not in data["environment"].get("device", {}):
        raise ValueError("its environment names no device")
    needed = (*_ROW, "sweep", "x") if data["benchmark"] == "scaling" else _ROW
    for i, row in enumerate(data["rows"]):
        if missing := [name for name in (*needed, *(_TIMED if row.get("status") == "ok" else ())) if name not in row]:
            raise ValueError(f"its row {i} lacks {', '.join(missing)}")
    stale = data["environment"].get("kernels_sha256") != kernels_sha256
    header = (data["benchmark"], data["environment"], data["ceilings"], data["settings"], data["complete"])
    return Result(*header, stale, tuple(data["rows"]))


def _headline(cases: Sequence[Case]) -> list[Case]:
    first = next((case for case in cases if case.trace == HEADLINE_TRACE), cases[0])
    same = [case for case in cases if (case.label, case.dtype) == (first.label, first.dtype)]
    return [case for case in same if case.direction == "both"] or same


def _work(case: Case) -> float:
    return max((row.get("flops") or 0 for row in case.rows), default=0)


# Scaling


@dataclass(frozen=True)
class Line:
    """One backend's rows along a sweep, by x."""

    op: str
    direction: str
    dtype: str
    backend: str
    ours: bool
    points: Mapping[float, Row]

    def costs(self) -> dict[float, float]:
        """Picoseconds per useful FLOP at each x where there are any."""
        good = {x: row for x, row in self.points.items() if usable(row) and row.get("flops")}
        return {x: row["ms"] * 1e9 / row["flops"] for x, row in good.items()}


def sweeps(result: Result) -> dict[str, list[Line]]:
    """The lines of a result of "scaling", by sweep, with rising x."""
    groups: dict[str, dict[tuple[Any, ...], dict[float, Row]]] = {}
    for row in result.rows:
        key = tuple(row[name] for name in ("op", "direction", "dtype", "backend", "ours"))
        groups.setdefault(row["sweep"], {}).setdefault(key, {})[row["x"]] = row
    return {
        sweep: [Line(*key, dict(sorted(points.items()))) for key, points in lines.items()]
        for sweep, lines in groups.items()
    }
