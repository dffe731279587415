"""An evaluation's folder: what was judged is kept as it comes, so an interrupted run goes on where it stopped.

``run.json`` says what is being evaluated: SHA-256 hashes of the model's files and of the data, and the settings that
verdicts depend on. ``predictions.jsonl`` has a line per image and condition (``undisturbed``, or a disturbance's name):
``{"condition", "index", "image", "group", "label", "verdict", "probability", "logit", "explanation", "error"}``, with
``index`` the image's place among those evaluated. The last line on an image counts. One with an error holds for its run
alone: the next run judges the image again, for what kept it from being read may have passed. A run on another model,
other data or other settings is refused; further conditions may join later, and the metrics are computed anew from the
lines in every run. A folder without a whole line binds nobody: a first start that failed leaves it to the corrected
one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unigendet.config import check
from unigendet.data.datasets import DetectionRecord
from unigendet.data.hashes import file_hash
from unigendet.data.transforms import check_file
from unigendet.evaluation.detection import DetectionOutcome
from unigendet.evaluation.robustness import Disturbance
from unigendet.evaluation.scoring import Detector, judge
from unigendet.files import PARTIAL, write_text

if TYPE_CHECKING:
    from unigendet.inference.calibration import Calibration

RUN_FILE, PREDICTIONS_FILE = "run.json", "predictions.jsonl"
SCHEMA = 2  # of run.json and predictions.jsonl
KIND = "unigendet evaluate detection"
UNDISTURBED = "undisturbed"
VERDICT_TOKENS = 32  # enough for the verdict's sentence in any vocabulary, for a model whose verdict is its text
ODD_NAMES = "backslashreplace"  # file names that are no text; what this makes of them, JSON reads back
JUDGED = ("verdict", "probability", "logit", "explanation", "error")  # fields of a row, as of an outcome
ROW = ("condition", "index", "image", *JUDGED)  # what a row must have to be read


def data_hash(records: Sequence[DetectionRecord], root: Path) -> str:
    """SHA-256 over the annotations, with image paths relative to ``root``, and the images' contents."""
    total = hashlib.sha256()
    for r in records:
        note = [r.image.relative_to(root).as_posix(), r.label, r.category, r.question, r.answer]
        total.update(json.dumps(note).encode())
        try:
            check_file(r.image)
            total.update(file_hash(r.image))
        except (
            OSError,
            ValueError,
        ) as error:  # it gets a row that says so; it is no reason to stop
            total.update(type(error).__name__.encode())
    return total.hexdigest()


def prepare_folder(folder: str | Path, identity: Mapping[str, Any]) -> Path:
    """Make an evaluation's folder, or find that it is one of the same ``identity``; returns it.

    One of another identity that has no verdict yet becomes this one's.

    Args:
        folder: a new or empty one, or one that an earlier evaluation left.
        identity: ``model``, ``data`` (hashes) and ``settings`` (name → plain value).

    Raises:
        ValueError: the folder is a file, holds something else, or an evaluation with another identity; says which.
    """
    folder = Path(folder)
    need = f"a new folder, or one that {KIND!r} left"
    check(not folder.exists() or folder.is_dir(), "out", f"{folder}, a file", need)
    run, predictions = folder / RUN_FILE, folder / PREDICTIONS_FILE
    if run.is_file():
        if _compare(run, identity, binding=predictions.is_file() and b"\n" in predictions.read_bytes()):
            return folder
    else:
        present = sorted(path.name for path in folder.iterdir() if not _partial(path)) if folder.is_dir() else []
        check(not present, "out", f"{folder}, which holds {', '.join(present[:5])}", need)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(run, json.dumps({"schema": SCHEMA, "kind": KIND, **identity}, indent=1) + "\n")
    return folder


def _partial(path: Path) -> bool:
    """Whether a file is half of one, which a process that was killed while writing it leaves."""
    return path.name.startswith(".") and path.name.endswith(f".{PARTIAL}")


def _compare(run: Path, identity: Mapping[str, Any], *, binding: bool) -> bool:
    """Whether ``run`` is an evaluation with this ``identity``; where it is ``binding``, another one is a ValueError."""
    try:
        found = json.loads(run.read_text(encoding="utf-8"))
        kind, settings = (found["schema"], found["kind"]), dict(found["settings"])
        hashes = found["model"], found["data"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{run} does not say what was evaluated; {KIND!r} needs another folder") from error
    check(kind == (SCHEMA, KIND), f"schema and kind of {run}", kind, f"{(SCHEMA, KIND)}; choose another folder")
    now = identity["settings"]
    other = [f"{name} {settings.get(name)!r}, now {now.get(name)!r}" for name in {**settings, **now}
             if settings.get(name) != now.get(name)]  # fmt: skip
    if not other:
        pairs = zip(("another model", "other data"), hashes, (identity["model"], identity["data"]), strict=True)
        other = [what for what, before, after in pairs if before != after]
    if other and binding:
        raise ValueError(
            f"{run.parent} holds an evaluation with {'; '.join(other)}: it cannot be continued, choose another folder"
        )
    return not other


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all; it may hold names that are no text."""
    write_text(path, text, errors=ODD_NAMES)


class Predictions:
    """The outcomes in an evaluation's folder, by condition and the image's place; new ones are written at once.

    Args:
        folder: of the evaluation.
        records: what is evaluated, in order.
        root: what image names are relative to.

    Images that could not be judged when the folder was left are missing again.

    Raises:
        ValueError: a line of ``predictions.jsonl`` is no prediction for these records; names it. A last line that was
            cut off when the run was stopped is dropped.
    """

    def __init__(self, folder: Path, records: Sequence[DetectionRecord], root: Path) -> None:
        self._file, self._records, self._root = folder / PREDICTIONS_FILE, records, root
        self._known: dict[str, dict[int, DetectionOutcome]] = {}
        content = self._file.read_bytes() if self._file.is_file() else b""
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self._read(json.loads(line))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{self._file}, line {number} is no prediction of this evaluation: {error}") from error
        if len(whole) < len(content):
            with self._file.open("r+b") as file:
                file.truncate(len(whole))
        for known in self._known.values():
            for index in [index for index, outcome in known.items() if outcome.error is not None]:
                del known[index]

    def _read(self, row: Any) -> None:
        if not isinstance(row, dict):
            raise ValueError("it is no object")
        lacks = [name for name in ROW if name not in row]
        if lacks:
            raise ValueError(f"it lacks {', '.join(lacks)}")
        index = row["index"]
        check(index in range(len(self._records)), "index", index, f"from 0 to {len(self._records) - 1}")
        record = self._records[index]
        check(row["image"] == self.name(index), "image", row["image"], self.name(index))
        outcome = DetectionOutcome(
            name=row["image"], group=record.category, label=record.label, **{name: row[name] for name in JUDGED}
        )
        self._known.setdefault(row["condition"], {})[index] = outcome

    def name(self, index: int) -> str:
        """What the image at a place is called."""
        return str(self._records[index].image.relative_to(self._root))

    def missing(self, condition: str) -> list[int]:
        """The places that have no outcome yet."""
        known = self._known.get(condition, {})
        return [i for i in range(len(self._records)) if i not in known]

    def outcomes(self, condition: str, *, with_references: bool) -> list[DetectionOutcome]:
        """All outcomes of a condition that is complete, in order; with the annotations that answers are compared with,
        or without them.
        """
        known = [self._known[condition][i] for i in range(len(self._records))]
        if not with_references:
            return known
        return [dataclasses.replace(o, reference=r.answer) for o, r in zip(known, self._records, strict=True)]

    def extend(self, condition: str, places: Sequence[int], outcomes: Iterable[DetectionOutcome]) -> Iterator[int]:
        """Write outcomes as they come; yields each one's place after it is on disk."""
        with self._file.open("a", encoding="utf-8", errors=ODD_NAMES) as file:
            for index, outcome in zip(places, outcomes, strict=True):
                row = {"condition": condition, "index": index, "image": outcome.name}
                row |= {name: getattr(outcome, name) for name in ("group", "label", *JUDGED)}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
                self._read(row)
                yield index


@dataclass(frozen=True)
class RunSettings:
    """How to judge, as ``scoring.judge`` takes it; ``disturbances``: further conditions, verdicts only."""

    question: str | None = None
    with_latent: bool = True
    max_new_tokens: int | None = None
    batch_size: int = 16
    calibration: Calibration | None = None
    disturbances: tuple[Disturbance, ...] = ()

    @property
    def with_text(self) -> bool:
        """Whether the answers' texts are asked for."""
        return self.max_new_tokens != 0

    @property
    def conditions(self) -> dict[str, Disturbance | None]:
        """Name → disturbance; None for the images as they are."""
        return {UNDISTURBED: None, **{disturbance.name: disturbance for disturbance in self.disturbances}}


def complete(
    predictions: Predictions,
    records: Sequence[DetectionRecord],
    settings: RunSettings,
    load: Callable[[], Detector],
    *,
    root: Path,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Judge what ``predictions`` lack.

    Args:
        predictions: of these records.
        records: what is evaluated.
        settings: how.
        load: makes the detector; called only if anything is missing.
        root: what image names are relative to.
        progress: called after every outcome.

    Raises:
        ValueError: a setting that the detector cannot do.
    """
    todo = {name: places for name in settings.conditions if (places := predictions.missing(name))}
    if not todo:
        return
    detector = load()
    need = "positive: without a real/fake head, the verdict is in the text"
    check(detector.has_head or settings.with_text, "max_new_tokens", settings.max_new_tokens, need)
    longest = settings.max_new_tokens
    if longest is None:  # by all questions: those that are missing are fewer when a run is continued
        asked = [r.question or None for r in records] if settings.question is None else [settings.question]
        longest = detector.default_answer(asked, with_latent=settings.with_latent)
    verdict_only = 0 if detector.has_head else min(longest, VERDICT_TOKENS)
    for name, places in todo.items():
        disturbance = settings.conditions[name]
        outcomes = judge(
            detector,
            [records[i] for i in places],
            root=root,
            question=settings.question,
            transform=disturbance,
            with_latent=settings.with_latent,
            max_new_tokens=longest if disturbance is None else verdict_only,
            batch_size=settings.batch_size,
            calibration=settings.calibration,
        )
        for _ in predictions.extend(name, places, outcomes):
            progress()
