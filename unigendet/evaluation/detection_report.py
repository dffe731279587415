"""The report of a detector's evaluation: ``evaluation.json``, ``evaluation.html`` and a table for the terminal."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from rich.console import Group
from rich.text import Text

from unigendet.data.datasets import DetectionRecord
from unigendet.data.transforms import read_image
from unigendet.environment import environment
from unigendet.evaluation.detection import REAL, DetectionMetrics, DetectionOutcome, DetectionSummary, probabilities
from unigendet.evaluation.detection_curves import (
    detector_curves,
    precision_recall_chart,
    reliability_chart,
    robustness_chart,
    roc_chart,
)
from unigendet.evaluation.detection_run import UNDISTURBED, Predictions, RunSettings, write_whole
from unigendet.evaluation.explanations import SentenceEncoder
from unigendet.evaluation.figures import data_uri
from unigendet.evaluation.pages import compact_table, detection_table, jinja_environment, number, percent
from unigendet.evaluation.reliability import reliability_bins
from unigendet.evaluation.results import Example, first_examples, plain
from unigendet.evaluation.robustness import KINDS, Disturbance, robustness_curves
from unigendet.evaluation.scoring import summarise

SCHEMA = 1  # of evaluation.json; rises when a key changes its meaning or goes
REPORT_FILES = ("evaluation.json", "evaluation.html")
THUMBNAIL = 192  # pixels of height, at most
SHOWN = 2  # right and wrong examples of a group


@dataclass(frozen=True, eq=False)
class DetectionReport:
    """Everything the report shows.

    ``outcomes`` of the images as they are, and their ``summary``; ``disturbed``: the summaries under disturbances.
    ``available``: images in the data set, of which the outcomes are a part. ``has_head``: whether the
    model has a real/fake head. ``encoder``: what
    ``SentenceEncoder.describe`` returned, None if there was none. ``environment`` None calls the function of that name.
    """

    title: str
    outcomes: Sequence[DetectionOutcome]
    summary: DetectionSummary
    available: int
    has_head: bool = True
    disturbed: Mapping[Disturbance, DetectionSummary] = field(default_factory=dict)
    examples: Sequence[Example] = ()
    encoder: Mapping[str, Any] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The content of ``evaluation.json``; ``write_detection_report`` documents the schema."""
        explained = self.summary.overall.explained > 0
        with_probability = self.summary.overall.calibration_error is not None
        labels = [o.label for o in self.outcomes]
        return plain(
            {
                "schema": SCHEMA,
                "kind": "detection",
                "title": self.title,
                "summary": f"{len(self.outcomes):,} images: {labels.count(REAL):,} real, {labels.count(0):,} fake.",
                "notes": list(_notes(self)),
                "environment": environment() if self.environment is None else self.environment,
                "settings": self.settings,
                "explanation_measures": {
                    "rouge_l": explained,
                    "tfidf_cosine": explained,
                    "css": self.encoder if explained else None,
                },
                "detection": {**self.summary.to_dict(), "roles": {}},
                "reliability": reliability_bins(probabilities(self.outcomes), labels) if with_probability else None,
                **detector_curves(self.outcomes),
                "robustness": robustness_curves(self.summary, self.disturbed),
                "unreadable": [{"name": o.name, "error": o.error} for o in self.outcomes if o.error is not None],
                "examples": [dataclasses.asdict(example.outcome) for example in self.examples],
            }
        )


def _notes(report: DetectionReport) -> Iterator[str]:
    """What a reader must know to read the numbers right."""
    overall, judged = report.summary.overall, len(report.outcomes)
    if judged < report.available:
        yield (
            f"Only {judged:,} of the data set's {report.available:,} images were judged, spread evenly over real and "
            "fake and over the groups."
        )
    if not overall.real or not overall.fake:
        only, missing = ("fake", "real") if overall.fake else ("real", "fake")
        yield (
            f"All images are {only}. Balanced accuracy, F1, AP and AUC need {missing} ones too, so they are not "
            "defined here."
        )
    if not report.has_head:
        yield "The model has no real/fake head: there are no probabilities, and verdicts are the answers' own."
    if overall.unsure:
        note = f"{overall.unsure:,} images lie within the calibration's unsure band and count as wrong."
        if overall.decided:
            share = percent(overall.decided_accuracy)
            note += f" {share} of the {overall.decided:,} others with a verdict were judged right."
        yield note
    if overall.unreadable:
        yield f"Images that could not be judged: {overall.unreadable:,}. They count as wrong."


def write_detection_report(folder: str | Path, report: DetectionReport) -> Path:
    """Write ``evaluation.json`` and ``evaluation.html`` into ``folder``; returns the path of the page.

    ``evaluation.json``, schema 1; an undefined or not-finite number is null: ``schema, kind, title, summary, notes``;
    ``environment`` {versions, platform, cpus, commit}; ``settings``; ``explanation_measures`` {rouge_l, tfidf_cosine:
    whether measured; css: null, or the sentence encoder's name, weights and longest text}; ``detection`` {overall,
    groups (fields of ``DetectionMetrics``), confusion, roles}; ``reliability`` null or bins (fields of
    ``ReliabilityBin``); ``roc``, ``precision_recall`` null or {x, y}; ``robustness`` {kind: points (fields of
    ``CurvePoint``)}; ``unreadable`` [{name, error}]; ``examples`` (fields of ``DetectionOutcome``).

    The same report gives the same bytes.
    """
    folder, data = Path(folder), report.to_dict()
    json_file, page = (folder / name for name in REPORT_FILES)
    write_whole(json_file, json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    overall = report.summary.overall
    values = {
        "run": data,
        "detection": data["detection"],
        "tiles": list(_tiles(overall, report.encoder is not None)),
        "charts": list(_charts(report)),
        "robustness": list(_robustness_charts(report)),
        "kinds": KINDS.values(),
        "answered": overall.explained > 0 or overall.text_accuracy is not None,
        "encoder": report.encoder,
        "examples": [
            {"outcome": e.outcome, "picture": data_uri([e.image], columns=1, size=THUMBNAIL, high=e.high)}
            for e in report.examples
        ],
        "unreadable": data["unreadable"],
    }
    write_whole(page, jinja_environment().get_template("evaluation.html").render(values))
    return page


def make_report(
    predictions: Predictions,
    records: Sequence[DetectionRecord],
    how: RunSettings,
    encoder: SentenceEncoder | None = None,
    **parts: Any,
) -> DetectionReport:
    """The report of complete predictions.

    Args:
        predictions: of ``records``, under every condition of ``how``.
        records: what was judged.
        how: they were judged.
        encoder: for ``css``.
        parts: the other fields of ``DetectionReport``.
    """
    outcomes = predictions.outcomes(UNDISTURBED, with_references=how.with_text)
    disturbed = {d: predictions.outcomes(d.name, with_references=False) for d in how.disturbances}
    return DetectionReport(
        outcomes=outcomes,
        summary=summarise(outcomes, encoder),
        disturbed={disturbance: summarise(values) for disturbance, values in disturbed.items()},
        examples=_examples(outcomes, records),
        encoder=None if encoder is None else encoder.describe(),
        **parts,
    )


def _examples(outcomes: Sequence[DetectionOutcome], records: Sequence[DetectionRecord]) -> tuple[Example, ...]:
    """The first right and wrong verdicts of every group, in order, with thumbnails; of images that can be read."""
    places = {id(outcome): i for i, outcome in enumerate(outcomes)}
    readable = [outcome for outcome in outcomes if outcome.error is None]
    examples = []
    for outcome in first_examples(readable, right=SHOWN, wrong=SHOWN):
        picture = read_image(records[places[id(outcome)]].image)
        picture.thumbnail((2 * THUMBNAIL, THUMBNAIL))
        examples.append(Example(outcome, np.asarray(picture), high=255))
    return tuple(examples)


def _tiles(overall: DetectionMetrics, with_css: bool) -> Iterator[dict[str, str]]:
    low, high = map(percent, overall.accuracy_interval)
    tiles = [
        ("Accuracy", overall.accuracy, f"Right verdicts of all images; 95 % interval {low} to {high}."),
        ("Balanced accuracy", overall.balanced_accuracy, "Mean of the shares of real and of fake images judged right."),
        ("AUC", overall.roc_auc, "Chance that a random fake looks more fake than a random real image."),
        ("Calibration error", overall.calibration_error, "How far confidence and success lie apart; lower is better."),
    ]
    if overall.explained:
        words = "Explanations like the annotations in words, rare ones counting more."
        meaning = "Explanations like the annotations in meaning, by a sentence encoder."
        tiles.append(("ROUGE-L", overall.rouge_l, "Words that explanations and annotations share, in order."))
        tiles.append(("CSS", overall.css, meaning) if with_css else ("TF-IDF cosine", overall.tfidf_cosine, words))
    for name, value, meaning in tiles:
        yield {"name": name, "value": percent(value), "meaning": meaning}


def _charts(report: DetectionReport) -> Iterator[dict[str, Any]]:
    """Of the probabilities; none without them, no ranking of one class."""
    curves, overall = detector_curves(report.outcomes), report.summary.overall
    if curves["roc"] is not None and curves["precision_recall"] is not None:
        svg = roc_chart(curves["roc"], name="ROC curve")
        yield {"title": "ROC", "value": f"AUC {percent(overall.roc_auc)}", "svg": Markup(svg)}
        svg = precision_recall_chart(
            curves["precision_recall"], overall.fake / overall.count, name="Precision by recall of the fakes"
        )
        yield {"title": "Precision", "value": f"AP {percent(overall.average_precision)}", "svg": Markup(svg)}
    if overall.calibration_error is not None:
        bins = reliability_bins(probabilities(report.outcomes), [o.label for o in report.outcomes])
        svg = reliability_chart(bins, name="Share of right verdicts by confidence")
        value = f"calibration error {percent(overall.calibration_error)}"
        yield {"title": "Reliability", "value": value, "svg": Markup(svg)}


def _robustness_charts(report: DetectionReport) -> Iterator[dict[str, Any]]:
    for kind, points in robustness_curves(report.summary, report.disturbed).items():
        title, axis = KINDS[kind].title, KINDS[kind].axis
        svg = robustness_chart(kind, points, name=f"Accuracy, balanced accuracy and AUC by {axis}")
        yield {"title": title, "value": "", "axis": axis, "svg": Markup(svg), "points": points}


def format_detection(report: DetectionReport) -> Group:
    """The end of an evaluation in the terminal: notes, the table per group, and the disturbances."""
    parts: list[Any] = [Text(note) for note in _notes(report)]
    parts += ["", detection_table(report.summary)]
    if report.disturbed:
        table = compact_table("Disturbed images", "disturbance", "accuracy", "balanced", "AUC")
        for disturbance, summary in report.disturbed.items():
            m = summary.overall
            table.add_row(disturbance.name, *map(percent, (m.accuracy, m.balanced_accuracy, m.roc_auc)))
        parts += ["", table]
    overall = report.summary.overall
    parts.append(f"\ncalibration error {percent(overall.calibration_error)}, Brier score {number(overall.brier)}")
    return Group(*parts)
