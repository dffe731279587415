"""What the reports share: numbers as texts, the templates of the pages, and tables for a terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import jinja2
from rich import box
from rich.table import Table
from rich.text import Text

from unigendet.evaluation.detection import DetectionSummary

MISSING = "–"
_NBSP = "\u00a0"  # a number does not part from its unit at the end of a line


def jinja_environment() -> jinja2.Environment:
    """The templates of the pages, with the filters ``percent``, ``number``, ``seconds``, ``commit`` and ``flat``."""
    # StrictUndefined: a name that a template and what renders it spell differently is an error, not a blank.
    jinja = jinja2.Environment(
        loader=jinja2.PackageLoader("unigendet.evaluation"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters.update(
        percent=percent, number=number, seconds=seconds, commit=_commit, flat=lambda value: list(_flat(value))
    )
    return jinja


def percent(value: float | None) -> str:
    """A fraction as "97.3 %"; a dash if undefined."""
    return MISSING if value is None else f"{100 * value:.1f}{_NBSP}%"


def number(value: float | None, digits: int = 3) -> str:
    """A number with ``digits`` significant digits; a dash if undefined."""
    if value is None:
        return MISSING
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 10 ** (digits - 1) else f"{rounded:.9g}"


def seconds(value: float | None) -> str:
    """A duration as "2 min 41 s", or "3.2 s" below a minute; a dash if undefined."""
    if value is None:
        return MISSING
    if value < 59.95:
        return f"{value:.1f}{_NBSP}s"
    whole = round(value)
    return (
        f"{whole // 60} min {whole % 60:02d} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    )


def _commit(commit: str | None) -> str:
    """The abbreviated commit of a recorded environment, and whether files differed from it."""
    short, plus, _ = (commit or "unknown").partition("+")
    return short[:12] + (" with local changes" if plus else "")


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as ("a.b.c", "value") pairs."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _flat(entry, f"{name}.{key}" if name else str(key))
    else:
        yield name, json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value


def compact_table(title: str, first: str, *numbers: str) -> Table:
    """A table for a terminal, with names in its first column and numbers in the others."""
    # No lines between the columns, and single spaces of padding: it has to fit a terminal of 80 columns.
    compact = {"box": box.SIMPLE, "show_edge": False, "pad_edge": False, "collapse_padding": True}
    table = Table(title=title, title_justify="left", title_style="bold", **compact)
    table.add_column(first)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def detection_table(summary: DetectionSummary, roles: Mapping[str, str] | None = None) -> Table:
    """A detector's numbers for a terminal, a row for each group and one for all; ``roles``: group → what it is."""
    rows = (*summary.groups, summary.overall)
    unparsed = ["unparsed"] * any(m.unparsed for m in rows)  # a column only if there is something to tell
    decided = ["of decided"] * len(unparsed)
    table = compact_table("Detection", "images", "n", *unparsed, "accuracy", *decided, "balanced", "AUC", "ROUGE-L")
    for m in rows:
        role = (roles or {}).get(m.group)
        table.add_row(
            Text(f"{m.group} ({role})" if role and role != m.group else m.group),
            str(m.count),
            *[str(m.unparsed)] * len(unparsed),
            percent(m.accuracy),
            *[percent(m.decided_accuracy) for _ in decided],
            *map(percent, (m.balanced_accuracy, m.roc_auc, m.rouge_l)),
        )
    return table
