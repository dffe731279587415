"""Recorded results as Markdown tables.

A row that was wrong says so and has no speed-up; rows that did not run stand below their table, by what they lack;
every table says from which commit it is, whether its kernels are the present ones, and whether its run was finished.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from .recorded import Case, Device, Line, Result, Row, ran, sweeps, usable, wrong
from .targets import Target

STALE = "**stale: measured with other kernels than the present ones**"
INCOMPLETE = "**incomplete: the run was not finished**"
BRIEF = {"CUDA device": "needs a CUDA device"}  # reasons that say this in more words
MAX_REASON = 110  # characters of why a row did not run

Cell = Callable[[Result, Case, Row], str]


def caption(device: Device, result: Result) -> str:
    """The line above a table: device, benchmark, commit, and the marks it deserves."""
    marks = [mark for mark, due in ((STALE, result.stale), (INCOMPLETE, not result.complete)) if due]
    when = (result.environment.get("time") or "").partition("T")[0]
    parts = [f"**{text(device.name)}**", text(result.benchmark), f"commit {result.commit}", *([when] if when else [])]
    return " · ".join([*parts, *marks])


def text(value: Any) -> str:
    """Free text, safe in a cell."""
    return re.sub(r"([|*<])", r"\\\1", str(value)).replace("\n", " ")


def number(value: float | None) -> str:
    """Three digits, without an exponent where it can be helped; nothing for None."""
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def percent(value: float | None) -> str:
    """A fraction in percent; nothing for None."""
    return "" if value is None else f"{100 * value:.{0 if abs(value) >= 0.1 else 1}f} %"


def factor(value: float) -> str:
    """A speed-up, with two decimals while it is small."""
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table; a title that begins with ">" is of numbers. Columns without any content are left out."""
    rows = list(rows)
    kept = [i for i in range(len(titles)) if any(row[i] for row in rows)]
    line = lambda cells: f"| {' | '.join(cells[i] for i in kept)} |"  # noqa: E731
    rule = "|" + "|".join("--:" if titles[i].startswith(">") else "---" for i in kept) + "|"
    return [line([title.removeprefix(">") for title in titles]), rule, *(line(row) for row in rows)]


def _milliseconds(result: Result, case: Case, row: Row) -> str:
    return f"{number(row['ms'])} ({number(row['p20'])}–{number(row['p80'])})"


def _rate(result: Result, case: Case, row: Row) -> str:
    tflops, gbs = row.get("tflops"), row.get("gbs")
    if tflops is not None and (gbs is None or row.get("bound") != "copy"):
        return f"{number(tflops)} TFLOP/s"
    return "" if gbs is None else f"{number(gbs)} GB/s"


def _of_ceiling(result: Result, case: Case, row: Row) -> str:
    share = percent(row.get("of_ceiling"))
    return f"{share} of {row['bound']}" if share and row.get("bound") else share


def _speedups(result: Result, case: Case, row: Row) -> str:
    return ", ".join(f"{factor(gain)}× {text(peer)}" for peer, gain in case.speedups(row).items())


def _peak(result: Result, case: Case, row: Row) -> str:
    peak = row.get("peak_mib")
    return "" if peak is None else f"{max(peak, 0):,.0f}"


def _right(result: Result, case: Case, row: Row) -> str:
    if row["correct"] is None:
        return "**not judged**" if "not_judged" in row else "not judged"
    return "**wrong**" if wrong(row) else "yes"


def _backend(result: Result, case: Case, row: Row) -> str:
    return f"**{text(row['backend'])}**" if row["ours"] else text(row["backend"])


COLUMNS: dict[str, Cell] = {
    "op": lambda result, case, row: text(case.op),
    "trace or shape": lambda result, case, row: text(case.label),
    "dtype": lambda result, case, row: text(case.dtype),
    "direction": lambda result, case, row: text(case.direction),
    "backend": _backend,
    ">ms (20–80 %)": _milliseconds,
    ">rate": _rate,
    ">of ceiling": _of_ceiling,
    ">speed-up": _speedups,
    ">peak MiB": _peak,
    ">first call, s": lambda result, case, row: number(row.get("first_call_s")),
    "right?": _right,
    ">tokens/s": lambda result, case, row: number(row.get("tokens_per_second")),
    ">MFU": lambda result, case, row: percent(row.get("mfu")),
    ">MFU, published count": lambda result, case, row: percent(row.get("mfu_published")),
}
CASE = ("op", "trace or shape", "dtype", "direction")
OP_COLUMNS = (*CASE, "backend", ">ms (20–80 %)", ">rate", ">of ceiling", ">speed-up", ">peak MiB", ">first call, s",
              "right?")  # fmt: skip
STEP_COLUMNS = (
    "op", "trace or shape", "dtype", "backend", ">ms (20–80 %)", ">tokens/s", ">MFU", ">MFU, published count",
    ">speed-up", ">peak MiB", ">first call, s", "right?",
)  # fmt: skip


def of_result(device: Device, result: Result, columns: Sequence[str] = OP_COLUMNS) -> list[str]:
    """The rows of a file. What rows of one case share is written once, in the first of them."""
    rows, shared = [], sum(name in CASE for name in columns)
    for case in result.cases():
        cells = [[COLUMNS[name](result, case, row) for name in columns] for row in case.rows if ran(row)]
        rows += [cells[i] if i == 0 else [""] * shared + cells[i][shared:] for i in range(len(cells))]
    lines = table(columns, rows) if rows else ["No row ran."]
    notes = [*_errors(result), *_not_run(result)]
    return [caption(device, result), "", *lines, *([""] if notes else []), *notes, ""]


def headline(choice: Sequence[tuple[Result, Case]], columns: Sequence[str]) -> list[str]:
    """The best of ours in each case; a case in which none may be shown says why instead of a time."""
    rows = []
    for result, case in choice:
        if (best := case.best()) is not None:
            rows.append([COLUMNS[name](result, case, best) for name in columns])
            continue
        known = dict.fromkeys(columns, "") | {name: COLUMNS[name](result, case, case.rows[0]) for name in CASE}
        known["backend"] = "**wrong**" if any(wrong(row) and row["ours"] for row in case.rows) else "did not run"
        rows.append([known[name] for name in columns])
    return table(columns, rows)


def _errors(result: Result) -> Iterator[str]:
    for case in result.cases():
        for row in filter(wrong, case.rows):
            far = [
                f"{name} {number(e['error'])} where {number(e['allowed'])} is allowed"
                for name, e in (row.get("error") or {}).items()
                if not e["error"] <= e["allowed"]
            ]
            where = f"{case.op}, {case.label}, {case.direction}, {row['backend']}"
            yield f"- **Wrong:** {text(where)}{': errors of ' if far else ''}{text('; '.join(far))}"


def _not_run(result: Result) -> Iterator[str]:
    """One line for each backend and reason, with the cases it concerns."""
    groups: dict[tuple[str, str], dict[tuple[str, str], list[str]]] = {}
    for case in result.cases():
        for row in case.rows:
            if not ran(row):
                places = groups.setdefault((row["backend"], reason(row["status"])), {})
                places.setdefault((case.op, case.label), []).append(case.direction)
    for (backend, why), places in groups.items():
        listed = "; ".join(f"{op} {label} ({', '.join(ways)})" for (op, label), ways in places.items())
        yield f"- {text(backend)} {text(why)}: {text(listed)}"


def reason(status: str) -> str:
    """Why a row did not run, in few words."""
    kind, _, why = status.partition(": ")
    if kind == "cannot run":
        why = next((brief for part, brief in BRIEF.items() if part in why), why)
    return f"{kind}: {why if len(why) <= MAX_REASON else why[:MAX_REASON] + '…'}"


def shares(device: Device, result: Result) -> list[str]:
    """Where the time of the training steps goes: a column for each part of the step."""
    rows = [(case, row) for case in result.cases() for row in case.rows if ran(row) and row.get("shares")]
    if not rows:
        return [caption(device, result), "", "The shares of time were not measured.", ""]
    parts = list(dict.fromkeys(part for _, row in rows for part in row["shares"]))
    cells = [
        [text(case.op), text(case.label), _backend(result, case, row), *(percent(row["shares"].get(p)) for p in parts)]
        for case, row in rows
    ]
    titles = ("op", "trace or shape", "backend", *(">" + text(part) for part in parts))
    return [caption(device, result), "", *table(titles, cells), ""]


def scaling(device: Device, result: Result) -> list[str]:
    """A table for each sweep: picoseconds per useful FLOP at each x, and the largest over the smallest."""
    lines = [caption(device, result), ""]
    for sweep, curves in sweeps(result).items():
        positions = sorted({x for curve in curves for x in curve.points})
        rows = []
        for curve in curves:
            costs = curve.costs()
            spread = f"{max(costs.values()) / min(costs.values()):.2f}" if len(costs) > 1 else ""
            backend = f"**{text(curve.backend)}**" if curve.ours else text(curve.backend)
            cells = [_cost(curve, costs, x) for x in positions]
            rows.append([text(curve.op), curve.direction, curve.dtype, backend, *cells, spread])
        titles = (
            "op", "direction", "dtype", "backend", *(f">{sweep.replace('_', ' ')} {_short(x)}" for x in positions),
            ">max/min",
        )  # fmt: skip
        lines += [*table(titles, rows), ""]
    notes = [*_errors(result), *_not_run(result)]
    return [*lines, *notes, *([""] if notes else [])]


def _short(x: float) -> str:
    return f"{x:,.0f}" if float(x).is_integer() else f"{x:g}"


def _cost(curve: Line, costs: Mapping[float, float], x: float) -> str:
    if x in costs:
        return number(costs[x])
    if (row := curve.points.get(x)) is None:
        return ""
    return "**wrong**" if wrong(row) else "FLOPs not counted" if usable(row) else "did not run"


def targets(device: Device | None, chosen: Sequence[Target]) -> list[str]:
    """Bounds and what was reached; without a device, nothing was measured."""
    rows = []
    for target in chosen:
        reached, verdict = ("not measured", "") if device is None else target.outcome(device)
        rows.append([text(target.name), text(target.bound), reached, verdict])
    return table(("target", "must reach", "reached", ""), rows)


def machine(device: Device) -> list[str]:
    """Device, versions and, for each benchmark, its commit, ceilings and settings."""
    hardware = device.hardware
    parts = [f"**{text(device.name)}**"]
    if hardware.get("processor"):
        parts.append(text(hardware["processor"]))
    if device.is_gpu:
        parts += [
            f"compute capability {hardware['capability']}",
            *(f"{name.removesuffix('_mib')} {value}{' MiB' if name.endswith('_mib') else ''}"
              for name in ("multiprocessors", "memory_mib", "driver") if (value := hardware.get(name))),
        ]  # fmt: skip
    environments = [result.environment for result in device.results.values()]
    software = dict.fromkeys(
        ", ".join([e.get("platform", ""), *(f"{name} {version}" for name, version in e.get("versions", {}).items())])
        for e in environments
    )
    rows = []
    for name, result in device.results.items():
        state = [mark for mark, due in (("**stale**", result.stale), ("**incomplete**", not result.complete)) if due]
        settings = ", ".join(f"{key} {value}" for key, value in result.settings.items())
        rates = [number(result.ceilings.get(key)) for key in ("matmul_tflops", "copy_gbs")]
        rows.append([text(name), result.commit, *rates, text(settings), ", ".join(state)])
    titles = ("benchmark", "commit", ">matrix product, TFLOP/s", ">copy, GB/s", "settings", "")
    return [", ".join(parts), "", *(f"- {text(line)}" for line in software), "", *table(titles, rows), ""]
