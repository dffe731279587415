"""What annotations say that cannot all be true, and what is good to know of them before a run. No image is opened."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from unigendet.data.datasets import DetectionRecord, parse_verdict

SHOWN = 80  # letters of an answer


class RealPaths:
    """Image paths as ``Path.resolve`` gives them, with one look into each folder instead of one at each file."""

    def __init__(self) -> None:
        self._folders: dict[Path, tuple[str, frozenset[str]]] = {}

    def __call__(self, path: Path) -> str:
        """The path without links, whether there is such a file or not."""
        folder = path.parent
        if folder not in self._folders:
            self._folders[folder] = os.path.realpath(folder), _links(folder)
        real, links = self._folders[folder]
        return os.path.realpath(path) if path.name in links else os.path.join(real, path.name)


def _links(folder: Path) -> frozenset[str]:
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries if entry.is_symlink())
    except OSError:  # it is not there, or may not be listed
        return frozenset()


@dataclass(frozen=True)
class Answer:
    """What a record of an image answers: the record's place and label, and the text's beginning."""

    image: str
    where: str
    label: int
    text: str


def check_answers(records: Iterable[DetectionRecord]) -> tuple[list[Answer], list[Answer]]:
    """The answers that say the other label, and those that say none (``parse_verdict``).

    A record without an answer is in neither.
    """
    contradicting, undecided = [], []
    for record in records:
        verdict = parse_verdict(record.answer)
        if verdict == record.label or not record.answer:
            continue
        text = record.answer if len(record.answer) <= SHOWN else f"{record.answer[:SHOWN]}…"
        answer = Answer(str(record.image), record.where, record.label, text)
        (undecided if verdict is None else contradicting).append(answer)
    return contradicting, undecided


def repeated(images: Iterable[str]) -> dict[str, int]:
    """The images that occur more than once, and how often."""
    return {image: count for image, count in Counter(images).items() if count > 1}


@dataclass(frozen=True)
class BothLabels:
    """An image that is labelled ``real`` in one place, the first that says so, and ``fake`` in another."""

    image: str
    real: str
    fake: str


def with_both_labels(images: Sequence[str], records: Sequence[DetectionRecord]) -> list[BothLabels]:
    """The images that have both labels; ``images``: of each record, its path without links."""
    places: dict[str, list[str | None]] = {}
    for image, record in zip(images, records, strict=True):
        own = places.setdefault(image, [None, None])
        own[record.label] = own[record.label] or record.where or str(record.image)
    return [BothLabels(image, real, fake) for image, (fake, real) in places.items() if fake and real]
