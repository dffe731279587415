"""What a run found, as frozen values: the input of the report."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from unigendet.config import check
from unigendet.environment import environment
from unigendet.evaluation.detection import DetectionOutcome, DetectionSummary
from unigendet.evaluation.generation import PIXEL_MAX, Agreement, JudgeReference

SCHEMA = 1  # of report.json; rises when a key changes its meaning or goes


@dataclass(frozen=True)
class Aim:
    """One headline number beside what it was hoped to be.

    ``value`` None: not measured. ``aim`` None: reported for its own sake. ``kind`` says how to write both: a fraction
    as ``percent``, a plain ``number``, or ``seconds``. ``meaning``: one sentence for a reader who is new to it.
    """

    name: str
    value: float | None
    aim: float | None = None
    higher_is_better: bool = True
    kind: Literal["percent", "number", "seconds"] = "percent"
    meaning: str = ""

    def __post_init__(self) -> None:
        check(self.kind in ("percent", "number", "seconds"), "kind", self.kind, "'percent', 'number' or 'seconds'")

    @property
    def reached(self) -> bool | None:
        """Whether the value is at least as good as the aim; None if there is no aim. Unmeasured is not reached."""
        if self.aim is None:
            return None
        if self.value is None or not math.isfinite(self.value):
            return False
        return self.value >= self.aim if self.higher_is_better else self.value <= self.aim


@dataclass(frozen=True, eq=False)
class ImageGrid:
    """Sample images, one row per prompt. ``images``: [rows, columns, H, W] grey or [rows, columns, H, W, 3] RGB.

    Values run from 0 (black) to ``high`` (white). ``rows``: the prompt of each row.
    Grids with the same rows that follow each other are shown side by side. The page says that no sample was picked for
    its looks, so hand over the first ones drawn.
    """

    title: str
    rows: tuple[str, ...]
    images: NDArray[Any]
    high: float = PIXEL_MAX

    def __post_init__(self) -> None:
        shape = np.shape(self.images)
        fits = len(shape) == 4 or (len(shape) == 5 and shape[4] == 3)
        check(fits and 0 not in shape, "images.shape", shape, "[rows, columns, H, W] or [rows, columns, H, W, 3]")
        check(len(self.rows) == shape[0], "rows", self.rows, f"{shape[0]} prompts, one per row of images")


@dataclass(frozen=True, eq=False)
class Example:
    """One verdict with its picture, [H, W] grey or [H, W, 3] RGB, from 0 (black) to ``high`` (white)."""

    outcome: DetectionOutcome
    image: NDArray[Any]
    high: float = PIXEL_MAX


@dataclass(frozen=True, eq=False)
class RunResults:
    """Everything a report shows. A part that is left empty is left out of the page.

    - ``aims``: the headline numbers, in order.
    - ``curves``: stage → points ``{"step": 10, "loss": 0.5, ...}``; a name may be missing at some steps.
    - ``detection``, ``examples``: of ``evaluate_detection`` and ``choose_examples``; ``roles``: group → what the group
      is to the detector ("real", "seen in training", "held out", "the model's own samples").
    - ``agreement``, ``frechet``: what was scored ("before DIGA", "after DIGA", "Gaussian mixture") → its score;
      ``reference``: the same measures on real digits.
    - ``settings``: any nesting of dicts, lists and plain values. ``durations``: what → seconds.
    - ``environment``: what the function ``environment`` returns; None calls it.
    """

    title: str = "UniGenDet quickstart"
    summary: str = ""
    seed: int | None = None
    aims: tuple[Aim, ...] = ()
    curves: Mapping[str, Sequence[Mapping[str, float]]] = field(default_factory=dict)
    grids: tuple[ImageGrid, ...] = ()
    detection: DetectionSummary | None = None
    roles: Mapping[str, str] = field(default_factory=dict)
    examples: tuple[Example, ...] = ()
    agreement: Mapping[str, Agreement] = field(default_factory=dict)
    frechet: Mapping[str, float | None] = field(default_factory=dict)
    reference: JudgeReference | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    durations: Mapping[str, float] = field(default_factory=dict)
    environment: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The numbers as plain nested dicts for JSON; ``write_report`` documents the schema."""
        detection = None
        if self.detection is not None:
            detection = {**self.detection.to_dict(), "roles": self.roles}
        return plain(
            {
                "schema": SCHEMA,
                "title": self.title,
                "summary": self.summary,
                "seed": self.seed,
                "environment": environment() if self.environment is None else self.environment,
                "settings": self.settings,
                "durations": self.durations,
                "aims": [{**dataclasses.asdict(aim), "reached": aim.reached} for aim in self.aims],
                "curves": self.curves,
                "detection": detection,
                "examples": [dataclasses.asdict(example.outcome) for example in self.examples],
                "agreement": {name: dataclasses.asdict(value) for name, value in self.agreement.items()},
                "frechet": self.frechet,
                "reference": None if self.reference is None else dataclasses.asdict(self.reference),
                "grids": [{"title": grid.title, "rows": grid.rows} for grid in self.grids],
            }
        )


def choose_examples(
    outcomes: Sequence[DetectionOutcome],
    images: Mapping[str, NDArray[Any]],
    *,
    right: int = 1,
    wrong: int = 1,
    high: float = PIXEL_MAX,
) -> tuple[Example, ...]:
    """The first ``right`` right and ``wrong`` wrong verdicts of every group, in the order given: nobody picks them.

    images: ``outcome.name`` → picture. Raises ValueError naming an image that is missing.
    """
    chosen = first_examples(outcomes, right=right, wrong=wrong)
    for outcome in chosen:
        check(outcome.name in images, "images", f"without {outcome.name!r}", "a picture for every outcome's name")
    return tuple(Example(outcome, images[outcome.name], high) for outcome in chosen)


def first_examples(outcomes: Sequence[DetectionOutcome], *, right: int = 1, wrong: int = 1) -> list[DetectionOutcome]:
    """The outcomes that ``choose_examples`` chooses, group by group, right ones before wrong ones."""
    chosen, taken = [], {}
    for outcome in outcomes:
        key = (outcome.group, outcome.correct)
        if taken.get(key, 0) < (right if outcome.correct else wrong):
            taken[key] = taken.get(key, 0) + 1
            chosen.append(outcome)
    groups = list(dict.fromkeys(outcome.group for outcome in outcomes))
    return sorted(chosen, key=lambda outcome: (groups.index(outcome.group), not outcome.correct))


def plain(value: Any) -> Any:
    """``value`` as JSON knows it: str keys, lists, Python numbers; not-finite numbers become None (JSON has none)."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    return str(value)
