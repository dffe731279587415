"""The rows of a run: one JSON schema, kept on disk as they come, and shown as a table.

A file holds one benchmark on one device: ``{"schema", "benchmark", "environment", "ceilings", "settings", "complete",
"rows"}``. Every row has

====================== =============================================================================================
``op``                 an op of ``unigendet.ops``, or ``decoder_layer``, ``gduf_step``, ``diga_step``, ``layout`` …
``trace``, ``shape``   the pack it ran on (``benchmarks/traces.py``) or None; sizes as text
``dtype``, ``direction``  ``forward``, ``backward``, ``both``, ``step`` or ``host``
``backend``, ``ours``  a backend of this package, or a peer
``status``             ``ok``, ``cannot run: why``, or ``failed: why``
====================== =============================================================================================

and, with status ``ok``, ``ms``, ``p20``, ``p80`` and ``runs``; ``first_call_s``, compilation included; ``peak_mib``;
``correct`` and ``error`` (largest absolute errors against float64, and what is allowed); the useful work of a call,
``flops`` and ``bytes``, and from it ``tflops``, ``gbs``, ``bound`` (which ceiling decides) and ``of_ceiling``; and for
ours ``speedup_over`` each peer. Benchmarks add columns of their own.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SCHEMA = 2  # of the JSON; rises when a key changes its meaning or goes
OPS = ("attention", "qk_norm_rope", "rms_norm", "swiglu", "stream_linear", "flow_matching", "alignment_loss")
BENCHMARKS = (*OPS, "decoder_layer", "training_step", "packing_cost", "scaling")  # modules of this package, in order
KEYS = ("op", "trace", "shape", "dtype", "direction", "backend", "sweep", "x")  # what identifies a row of a benchmark

_WIDTHS = {
    "direction": 10, "backend": 21, "ms": 9, "20-80 %": 16, "useful": 16, "ceiling": 9, "MiB": 7, "right": 7,
    "faster": 0,
}  # fmt: skip


class Record:
    """The rows of a benchmark, kept in a file as they come (``path`` None: in memory only).

    While it runs, and after a run that was not finished where an earlier one was, that is ``<path>.partial``: what was
    complete is replaced by what is complete.
    """

    def __init__(self, path: Path | None, benchmark: str, header: Mapping[str, Any]) -> None:
        self.path, self.benchmark = path, benchmark
        self.header = {"schema": SCHEMA, "benchmark": benchmark, **header}
        self.rows: list[dict[str, Any]] = []
        self.complete = False

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add rows and write the file anew: what is done stays, whatever comes."""
        self.rows += rows
        self.write()

    def close(self, *, complete: bool) -> Path | None:
        """The run is over, by its end or not; returns the file that its rows are in."""
        self.complete = complete
        self.write()
        if self.path is None or not (complete or not self._earlier_is_complete()):
            return self._partial
        self._partial.replace(self.path)
        return self.path

    def _earlier_is_complete(self) -> bool:
        try:
            return bool(read_json(self.path)["complete"])
        except (OSError, ValueError, KeyError):
            return False

    @property
    def _partial(self) -> Path | None:
        return None if self.path is None else self.path.with_name(self.path.name + ".partial")

    @property
    def content(self) -> dict[str, Any]:
        """What the file holds."""
        return {**self.header, "complete": self.complete, "rows": self.rows}

    def write(self) -> None:
        """Write what there is so far."""
        if self._partial is not None:
            write_json(self._partial, self.content)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file of results, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """A file of results. Raises ValueError if it is none, or of another schema."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        schema = content["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of benchmark results: {error}") from error
    if schema != SCHEMA:
        raise ValueError(f"{path} has schema {schema}; it must be {SCHEMA}: record it again")
    return content


def identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a row measures, apart from the benchmark and the device."""
    return tuple(row.get(key) for key in KEYS)


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines for the terminal: per case a title, a line per measured row, and what did not run, by why."""
    lines: list[str] = []
    for title, group in itertools.groupby(rows, key=_title):
        own = list(group)
        lines += ["", title]
        measured = [row for row in own if row["status"] == "ok"]
        if measured:
            lines.append("  " + "".join(f"{name:<{width}}" for name, width in _WIDTHS.items()).rstrip())
            lines += ["  " + _line(row) for row in measured]
        reasons: dict[str, dict[str, list[str]]] = {}
        for row in own:
            if row["status"] != "ok":
                reasons.setdefault(row["status"], {}).setdefault(row["backend"], []).append(row["direction"])
        everything = list(dict.fromkeys(row["direction"] for row in own))
        for status, names in reasons.items():
            named = (
                n if directions == everything else f"{n} {'/'.join(directions)}" for n, directions in names.items()
            )
            lines.append(f"  {', '.join(named)}: {status}")
    return lines


def _title(row: Mapping[str, Any]) -> str:
    sweep = f"{row['sweep'].replace('_', ' ')} {row['x']:g}" if "sweep" in row else None
    return " · ".join(str(part) for part in (row["op"], sweep, row["trace"], row["shape"], row["dtype"]) if part)


def _line(row: Mapping[str, Any]) -> str:
    backend = ("" if row["ours"] else "(") + row["backend"] + ("" if row["ours"] else ")")
    start = f"{row['direction']:<{_WIDTHS['direction']}}{backend:<{_WIDTHS['backend']}}"
    of_ceiling = row.get("of_ceiling")
    cells = {
        "ms": number(row["ms"]),
        "20-80 %": f"{number(row['p20'])}-{number(row['p80'])}",
        "useful": useful(row),
        "ceiling": "" if of_ceiling is None else f"{100 * of_ceiling:.0f} %",
        "MiB": "" if row.get("peak_mib") is None else f"{max(0.0, row['peak_mib']):.0f}",
        "right": {True: "yes", False: "WRONG", None: ""}[row.get("correct")],
    }
    faster = ", ".join(f"{factor:.2f}x {peer}" for peer, factor in row.get("speedup_over", {}).items())
    return (start + "".join(f"{cells[name]:<{_WIDTHS[name]}}" for name in cells) + faster).rstrip()


def useful(row: Mapping[str, Any]) -> str:
    """The rate of useful work, by the ceiling that decides."""
    if row.get("bound") == "matmul":
        tflops = row["tflops"]
        return f"{number(tflops)} TFLOP/s" if tflops >= 1 else f"{number(1e3 * tflops)} GFLOP/s"
    return f"{number(row['gbs'])} GB/s" if row.get("bound") == "copy" else ""


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    digits = 2 - max(-6, int(f"{abs(value):e}".partition("e")[2]))
    return f"{value:.{max(0, digits)}f}"
