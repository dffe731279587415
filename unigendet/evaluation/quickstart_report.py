"""The report of a quickstart.

``report.json`` holds the numbers, ``report.html`` is a page to look at, and ``format_table`` ends the run in the
terminal.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Group
from rich.table import Table
from rich.text import Text

from unigendet.evaluation.figures import data_uri, line_chart, save_image_grid
from unigendet.evaluation.generation import COMPONENTS
from unigendet.evaluation.pages import (
    MISSING,
    compact_table,
    detection_table,
    jinja_environment,
    number,
    percent,
    seconds,
)
from unigendet.evaluation.results import Aim, ImageGrid, RunResults, plain
from unigendet.files import write_text


def write_report(folder: str | Path, results: RunResults) -> Path:
    """Write the report of a run into ``folder`` (made if need be) and return the path of the page.

    - ``report.html``: one self-contained page without scripts.
    - ``grids/NN-title.png``: the sample grids.
    - ``report.json``, schema 1; an undefined or not-finite number is null:
      ``schema, title, summary, seed``;
      ``environment`` {versions {package: version}, platform, cpus, commit}; ``settings``;
      ``durations`` {what: seconds};
      ``aims`` [{name, value, aim, higher_is_better, kind, meaning, reached}];
      ``curves`` {stage: [{step, name: value, ...}]};
      ``detection`` null or {overall, groups [...] (fields of ``DetectionMetrics``),
      confusion {label: {verdict: count}}, roles {group: role}}; ``examples`` [fields of ``DetectionOutcome``];
      ``agreement`` {what: fields of ``Agreement``}; ``frechet`` {what: distance};
      ``reference`` null or fields of ``JudgeReference``; ``grids`` [{title, rows}].

    Each text is written whole or not at all. The same results give the same bytes: no time stamps, no random ids.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = results.to_dict()
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(folder / "report.json", text + "\n")
    for i, grid in enumerate(results.grids):
        slug = re.sub(r"[^a-z0-9]+", "-", grid.title.lower()).strip("-")
        images, (_, columns, height) = grid.images.reshape(-1, *grid.images.shape[2:]), grid.images.shape[:3]
        path = folder / "grids" / f"{i:02d}-{slug}.png"
        save_image_grid(images, path, columns=columns, scale=max(1, 64 // height), high=grid.high)
    page = folder / "report.html"
    write_text(page, _render(results, data))
    return page


def _render(results: RunResults, data: dict[str, Any]) -> str:
    return (
        jinja_environment()
        .get_template("quickstart.html")
        .render(
            run=data,
            aims=[aim_view(aim) for aim in results.aims],
            charts=_charts(data["curves"]),
            sample_tables=list(_sample_tables(results.grids)),
            examples=[
                {"outcome": e.outcome, "picture": data_uri([e.image], columns=1, size=192, high=e.high)}
                for e in results.examples
            ],
            digits=sorted({digit for a in results.agreement.values() for digit in a.per_digit}),
            bars=_bars(data),
            components=COMPONENTS,
        )
    )


_WRITERS = {"percent": percent, "number": number, "seconds": seconds}


def aim_view(aim: Aim) -> dict[str, Any]:
    """An aim as texts: ``name``, ``value``, ``aim`` (None without one), ``verdict`` and ``meaning``; and its ``state``,
    ``reached``, ``missed`` or ``none``.
    """
    write = _WRITERS[aim.kind]
    sign = "≥" if aim.higher_is_better else "≤"
    return {
        "name": aim.name,
        "value": write(plain(aim.value)),
        "aim": None if aim.aim is None else f"{sign} {write(aim.aim)}",
        "state": {None: "none", True: "reached", False: "missed"}[aim.reached],
        "verdict": _aim_verdict(aim),
        "meaning": aim.meaning,
    }


def _aim_verdict(aim: Aim) -> str:
    if aim.reached is None:
        return "no aim set"
    if aim.reached:
        return "reached"
    return "not measured" if plain(aim.value) is None else "not reached"


def _charts(curves: Mapping[str, list[dict[str, float | None]]]) -> dict[str, list[dict[str, Any]]]:
    """Stage → one chart per name that its points carry."""
    charts = {}
    for stage, points in curves.items():
        names = [name for name in dict.fromkeys(itertools.chain.from_iterable(points)) if name != "step"]
        charts[stage] = []
        for name in names:
            known = [(p["step"], p[name]) for p in points if p.get(name) is not None]
            if known:
                steps, values = zip(*known, strict=True)
                svg = line_chart(steps, values, name=f"{stage}: {name} by step", salt=f"{stage}/{name}")
                last = f"{number(values[-1])} at step {number(steps[-1], 9)}"
                charts[stage].append({"title": name, "value": last, "svg": Markup(svg)})
    return charts


def _sample_tables(grids: tuple[ImageGrid, ...]) -> Iterator[dict[str, Any]]:
    """Neighbouring grids of the same rows make one table: a row per prompt, a column per grid."""
    for rows, group in itertools.groupby(grids, key=lambda grid: grid.rows):
        together = list(group)
        lines = []
        for i, prompt in enumerate(rows):
            strips = [
                data_uri(g.images[i], columns=g.images.shape[1], size=_strip_size(g), high=g.high) for g in together
            ]
            lines.append({"prompt": prompt, "strips": strips})
        yield {"titles": [grid.title for grid in together], "lines": lines}


def _strip_size(grid: ImageGrid) -> int:
    """Height of a sample on the page: tiny images are enlarged, large ones kept to what a strip can show."""
    return min(max(48, grid.images.shape[2]), 160)


def _bars(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The Fréchet distances with those of real digits, each with its share of the longest, in percent."""
    bars = [{"name": name, "value": value, "real": False} for name, value in data["frechet"].items()]
    if data["reference"] is not None:
        same_size, everything = data["reference"]["frechet_train_matched"], data["reference"]["frechet_train"]
        bars.append({"name": "real training digits, same number", "value": same_size, "real": True})
        bars.append({"name": "real training digits, all", "value": everything, "real": True})
    longest = max((bar["value"] for bar in bars if bar["value"] is not None), default=0)
    return [{**bar, "share": round(100 * (bar["value"] or 0) / longest, 1) if longest else 0} for bar in bars]


def format_table(results: RunResults) -> Group:
    """The end of a run in the terminal: headline numbers against their aims, detection per group, generation.

    Print it with ``rich.console.Console().print(format_table(results))``.
    """
    parts: list[Table | str] = []
    if results.aims:
        parts += ["", _aims_table(results)]
    if results.detection is not None:
        parts += ["", detection_table(results.detection, results.roles)]
    if results.agreement or results.frechet:
        parts += ["", _generation_table(results)]
    return Group(*parts)


def _aims_table(results: RunResults) -> Table:
    table = compact_table(results.title, "", "value", "aim")
    table.add_column("")
    styles = {"reached": "green", "missed": "red", "none": "dim"}
    for view in map(aim_view, results.aims):
        # Text, not str: a name with square brackets is not markup.
        table.add_row(
            Text(view["name"]), view["value"], view["aim"] or MISSING, Text(view["verdict"], styles[view["state"]])
        )
    return table


def _generation_table(results: RunResults) -> Table:
    table = compact_table("Generation", "images", "prompt agreement", "Fréchet distance")
    for name in dict.fromkeys([*results.agreement, *results.frechet]):
        agreement = results.agreement.get(name)
        table.add_row(
            Text(name),
            percent(agreement.accuracy if agreement else None),
            number(plain(results.frechet.get(name))),
        )
    if results.reference is not None:
        r = results.reference
        table.add_row("real digits", percent(r.svm_accuracy), number(r.frechet_train_matched))
    return table
