"""The report of a study: ``study.json`` holds the numbers, ``report.html`` is a page to look at.

The texts of means, intervals and differences are made here, for the page and for documents alike.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from markupsafe import Markup

from unigendet.evaluation.comparisons import METRICS, Metric
from unigendet.evaluation.figures import ForestRow, forest_plot
from unigendet.evaluation.pages import jinja_environment, number, percent, seconds
from unigendet.files import write_text

STUDY_SCHEMA = 1  # of study.json; rises when a key changes its meaning or goes
_METRICS = {metric.name: metric for metric in METRICS}


def write_study(folder: str | Path, study: dict[str, Any]) -> dict[str, Any]:
    """Write ``study.json`` and ``report.html`` into ``folder`` and return what the first holds.

    - ``schema`` 1; ``draws``; ``quickstart``: the settings that the arms change;
    - ``metrics`` [{name, title, kind, higher_is_better, meaning, compared}];
    - ``arms`` [{name, title, after, overrides, controls, seeds [those with a result]}];
    - ``estimates``, ``comparisons``, ``joint_confidence``: see ``comparisons.summarise``;
    - ``runs`` [{seed, arm, metrics {name: value}, draws {name: [value]}, reference (fields of ``JudgeReference``),
      seconds, cpu_seconds {what: seconds}}];
    - ``environments``: those of the runs, each once; null where a number does not exist.

    Each is written whole or not at all. The same study gives the same bytes.
    """
    study = {"schema": STUDY_SCHEMA, **study}
    text = json.dumps(study, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(Path(folder) / "study.json", text + "\n")
    forests = [{"title": metric.title, "svg": Markup(svg)} for metric, svg in _forests(study)]
    page = jinja_environment().get_template("study.html").render(study=study, forests=forests, **study_texts(study))
    write_text(Path(folder) / "report.html", page)
    return study


def study_texts(study: Mapping[str, Any]) -> dict[str, Any]:
    """A study's numbers as texts, for the page and for documents, by the names that the template uses.

    ``primary`` and ``exploratory`` [fields of ``difference``], ``joint``: the confidence of the primary ones' wider
    intervals, ``table`` {``titles``, ``lines`` [{``arm``, ``seeds``, ``values``}]}, ``chance`` {``count``, ``apart``,
    ``expected``}, ``reference``, ``cost``, ``seeds``.
    """
    titles = _titles(study)
    entries = [difference(entry, titles) for entry in study["comparisons"]]
    primary = [entry for entry in entries if entry["primary"]]
    exploratory = [entry for entry in entries if not entry["primary"]]
    shown = [m for m in METRICS if any(m.name in own for own in study["estimates"].values())]
    lines = []
    for arm in study["arms"]:
        if own := study["estimates"][arm["name"]]:
            values = [estimate(own.get(m.name), m) for m in shown]
            lines.append({"arm": arm["title"], "seeds": len(arm["seeds"]), "values": values})
    return {
        "primary": primary,
        "exploratory": exploratory,
        "joint": percent(study["joint_confidence"]),
        "table": {"titles": [m.title for m in shown], "lines": lines},
        "chance": _chance(study["comparisons"]),
        "reference": reference(study["runs"]),
        "cost": {what: seconds(sum(sum(run[what].values()) for run in study["runs"])) for what in _COSTS},
        "seeds": sorted({run["seed"] for run in study["runs"]}),
    }


_COSTS = ("seconds", "cpu_seconds")


def _titles(study: Mapping[str, Any]) -> dict[str, str]:
    return {arm["name"]: arm["title"] for arm in study["arms"]}


def value_text(value: float | None, metric: Metric, *, signed: bool = False) -> str:
    """A metric's value; ``signed``: a difference, of percentages in points, with its sign."""
    if value is None:
        return percent(None)
    if signed:
        scaled, unit = (100 * value, "\u00a0points") if metric.kind == "percent" else (value, "")
        return f"{scaled:+.2f}{unit}".replace("-", "−")
    return percent(value) if metric.kind == "percent" else number(value)


def estimate(values: Mapping[str, Any] | None, metric: Metric) -> str:
    """A mean with its interval: "36.7 (35.9 to 37.4)"."""
    if values is None:
        return percent(None)
    mean = value_text(values["mean"], metric)
    if values["low"] is None:
        return mean
    return f"{mean} ({value_text(values['low'], metric)} to {value_text(values['high'], metric)})"


def difference(entry: Mapping[str, Any], titles: Mapping[str, str]) -> dict[str, Any]:
    """A comparison as texts: ``what``, ``metric``, ``mean``, ``interval``, ``joint``, ``seeds``, ``verdict``.

    The verdict goes by the interval of 95 %, that of a primary comparison by the one that covers all of them together.
    """
    metric = _METRICS[entry["metric"]]
    low, high = entry["low"], entry["high"]
    read = (entry["joint_low"], entry["joint_high"]) if entry["primary"] else (low, high)
    text = {
        end: value_text(entry[end], metric, signed=True) for end in ("mean", "low", "high", "joint_low", "joint_high")
    }
    return {
        "primary": entry["primary"],
        "what": f"{titles[entry['arm']]} against {titles[entry['control']]}",
        "metric": metric.title,
        "mean": text["mean"],
        "interval": "–" if low is None else f"{text['low']} to {text['high']}",
        "joint": "–" if entry["joint_low"] is None else f"{text['joint_low']} to {text['joint_high']}",
        "seeds": f"{entry['better']} better, {entry['worse']} worse of {entry['count']}",
        "verdict": _verdict(*read, metric),
    }


def _verdict(low: float | None, high: float | None, metric: Metric) -> str:
    if low is None or high is None:
        return "one seed: no interval"
    if low <= 0 <= high:
        return "no difference shown"
    return "better" if (low > 0) == metric.higher_is_better else "worse"


def _chance(comparisons: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many exploratory differences have an interval, how many lie apart from zero, how many would by chance."""
    known = [entry for entry in comparisons if not entry["primary"] and entry["low"] is not None]
    apart = sum(not entry["low"] <= 0 <= entry["high"] for entry in known)
    return {"count": len(known), "apart": apart, "expected": number(0.05 * len(known), 2)}


def reference(runs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What real digits score, over the seeds: as texts, by the name of the metric."""
    by_seed = {run["seed"]: run["reference"] for run in runs}
    fields = {"agreement": "svm_accuracy", "frechet": "frechet_train_matched"}
    means = {name: fmean(entry[field] for entry in by_seed.values()) for name, field in fields.items()}
    return {name: value_text(mean, _METRICS[name]) for name, mean in means.items()}


def _forests(study: Mapping[str, Any]) -> Iterator[tuple[Metric, str]]:
    """A forest plot for every metric that differences are known of."""
    titles = _titles(study)
    for metric in METRICS:
        scale = 100 if metric.kind == "percent" else 1
        rows = [
            ForestRow(
                f"{titles[entry['arm']]} − {titles[entry['control']]}",
                scale * entry["mean"],
                None if entry["low"] is None else scale * entry["low"],
                None if entry["high"] is None else scale * entry["high"],
                entry["primary"],
            )
            for entry in study["comparisons"]
            if entry["metric"] == metric.name
        ]
        if rows:
            side = "right" if metric.higher_is_better else "left"
            unit = "percentage points; " if metric.kind == "percent" else ""
            axis = f"{unit}{side} of zero is better"
            yield metric, forest_plot(rows, axis=axis, name=f"Differences in {metric.title}", salt=metric.name)
