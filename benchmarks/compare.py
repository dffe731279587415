"""What became slower since an earlier run on the same machine, with the noise of both runs taken into account.

Machines drift between runs. The peers of a case, which nobody changed, say by how much: a row's time is divided by the
median drift of the right peers in its case and direction (1 where it has none). A row is *slower* if then even its 20th
percentile lies above the old run's 80th and its median is more than 5 % longer, *faster* the other way round. An answer
that was right and is wrong, and a row that ran and fails, count as slower; what a run had no time for does not.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .contest import OUT_OF_TIME
from .record import KEYS, identity, number, read_json

THRESHOLD = 1.05  # of medians: less is not worth a word, even if it is no noise
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Difference:
    """A row of ours that differs: ``kind`` is slower, faster, wrong, broken; ``factor`` new over old, without drift."""

    kind: str
    row: Row
    old: Row
    factor: float | None = None
    drift: float = 1.0

    @property
    def is_regression(self) -> bool:
        """Whether anything became worse."""
        return self.kind != "faster"

    def __str__(self) -> str:
        parts = (self.row[key] for key in ("op", "trace", "shape", "dtype", "direction", "backend"))
        where = " · ".join(str(part) for part in parts if part)
        if self.factor is None:
            return f"{self.kind:<7} {where}: {self.row['status'] if self.kind == 'broken' else 'the answer is wrong'}"
        times = f"{number(self.old['ms'])} -> {number(self.row['ms'])} ms"
        return f"{self.kind:<7} {where}: {self.factor:.2f} x the old time ({times}, peers {self.drift:.2f} x)"


def machine(content: Mapping[str, Any]) -> str:
    """What a file of results was measured on, in words: only the same machine and size of run can be compared."""
    device, settings = content["environment"]["device"], content.get("settings", {})
    facts = [device["name"], device.get("processor")]
    facts += [
        f"{settings[name]}{text}" for name, text in (("threads", " CPU threads"), ("size", " run")) if name in settings
    ]
    return ", ".join(str(fact) for fact in facts if fact)


def read_results(path: Path) -> tuple[str, dict[tuple, Row]]:
    """The machine and the rows of a file of results, or of all files below a folder.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a file is no file of results, or the folder has none, or those of several machines.
    """
    if not path.exists():
        raise FileNotFoundError(f"there are no results to compare with at {path}")
    files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    contents = [read_json(file) for file in files]
    machines = {machine(content) for content in contents}
    if len(machines) != 1:
        found = "; ".join(sorted(machines)) or "no results"
        raise ValueError(f"{path} holds {found}: it must hold results of one machine and one number of threads")
    return machines.pop(), keyed([{"benchmark": c["benchmark"], **row} for c in contents for row in c["rows"]])


def keyed(rows: Sequence[Row]) -> dict[tuple, Row]:
    """Rows, which must name their benchmark, by what they measure."""
    return {(row["benchmark"], *identity(row)): row for row in rows}


def differences(old: Mapping[tuple, Row], new: Mapping[tuple, Row]) -> list[Difference]:
    """What is different in the rows of ours that both runs have; the worst first."""
    drifts = _drifts(old, new)
    found = list(_differences(old, new, drifts))
    return sorted(found, key=lambda d: (not d.is_regression, -(d.factor or float("inf"))))


def _differences(
    old: Mapping[tuple, Row], new: Mapping[tuple, Row], drifts: Mapping[tuple, float]
) -> Iterator[Difference]:
    for key, row in new.items():
        before = old.get(key)
        if before is None or not row["ours"] or before["status"] != "ok" or row["status"].endswith(OUT_OF_TIME):
            continue
        if row["status"] != "ok":
            yield Difference("broken", row, before)
        elif row.get("correct") is False and before.get("correct") is not False:
            yield Difference("wrong", row, before)
        else:
            drift = drifts.get(_case(row), 1.0)
            factor = row["ms"] / before["ms"] / drift
            if factor > THRESHOLD and row["p20"] / drift > before["p80"]:
                yield Difference("slower", row, before, factor, drift)
            elif factor < 1 / THRESHOLD and row["p80"] / drift < before["p20"]:
                yield Difference("faster", row, before, factor, drift)


def _case(row: Row) -> tuple:
    return tuple(row.get(key) for key in ("benchmark", *KEYS) if key != "backend")


def _is_right(row: Row) -> bool:
    return row["status"] == "ok" and row.get("correct") is not False


def _drifts(old: Mapping[tuple, Row], new: Mapping[tuple, Row]) -> dict[tuple, float]:
    """By case and direction, how many times the old time its peers took."""
    factors: dict[tuple, list[float]] = {}
    for key, row in new.items():
        before = old.get(key)
        if before is not None and not row["ours"] and _is_right(row) and _is_right(before):
            factors.setdefault(_case(row), []).append(row["ms"] / before["ms"])
    return {case: statistics.median(values) for case, values in factors.items()}
