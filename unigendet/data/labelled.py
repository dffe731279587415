"""Labelled images, from either of the two forms in which users keep them, as detection records."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from unigendet.config import check
from unigendet.data.datasets import DetectionRecord, read_detection
from unigendet.data.entries import Malformed
from unigendet.data.image_files import is_image_name, list_images

REAL_NAME, FAKE_NAME = "real", "fake"
VERDICTS = ("This is a fake image.", "This is a real image.")  # indexed by label; what ``parse_verdict`` reads
_FORM = (
    f"it must hold images in {REAL_NAME}/, {FAKE_NAME}/ or both, those in {FAKE_NAME}/ in one sub-folder per generator "
    "or directly"
)


def read_labelled(
    path: str | Path,
    *,
    image_root: str | Path | None = None,
    root_option: str = "image_root",
    malformed: list[Malformed] | None = None,
) -> list[DetectionRecord]:
    """Read labelled images.

    Args:
        path: a FakeClue annotation file (see ``unigendet.data.datasets``); or a folder with ``real/`` and ``fake/``,
            or one of them. Images are looked for at any depth (``unigendet.data.image_files.list_images``).
        image_root: of an annotation file: what its paths are relative to; default: the file's folder.
        root_option: what errors call ``image_root``.
        malformed: of an annotation file, see ``read_detection``.

    Returns:
        The file's records in its order; or a folder's, real images first, then the generators by name. A folder's
        records have no question and no answer (""), and the category ``real``, the name of the sub-folder of ``fake/``,
        or ``fake`` for fakes that lie in no sub-folder.

    Raises:
        FileNotFoundError: ``path`` does not exist.
        ValueError: a malformed annotation file; a folder with other sub-folders or images beside ``real/`` and
            ``fake/``, with a folder that holds no images, or with a generator of the name ``real``; an ``image_root``
            for a folder. Names the path and what it must hold.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"labelled images: {path} does not exist; it must be an annotation file or a folder")
    if not path.is_dir():
        return read_detection(path, image_root, malformed)
    if image_root is not None:
        raise ValueError(
            f"{root_option} is {str(image_root)!r}; leave it out: {path} is a folder, which holds its images itself"
        )
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    folders = [entry.name for entry in entries if entry.is_dir()]
    others = [entry.name for entry in entries if entry.is_file() and is_image_name(entry)]
    others += [f"{name}/" for name in folders if name not in (REAL_NAME, FAKE_NAME)]
    if others or not folders:
        raise ValueError(f"folder {path} holds {', '.join(others) or 'no sub-folders'}; {_FORM}")
    needed = f"real images, or remove it: {FAKE_NAME}/ is enough"
    records = _records(path / REAL_NAME, 1, REAL_NAME, needed) if REAL_NAME in folders else []
    return records + (_fakes(path / FAKE_NAME) if FAKE_NAME in folders else [])


def with_texts(records: Sequence[DetectionRecord], question: str) -> list[DetectionRecord]:
    """Records to train on: those of a folder, which have no texts, get ``question`` and the plain verdict."""
    return [
        record if record.question else dataclasses.replace(record, question=question, answer=VERDICTS[record.label])
        for record in records
    ]


def check_present(records: Sequence[DetectionRecord], root_option: str = "--image-root") -> None:
    """Raise FileNotFoundError if any image does not exist: paths are then relative to something else, or the data set
    is not all there, and no score of it would mean anything. Says how many and which is the first; ``root_option``: the
    setting that says what paths are relative to. What is there and cannot be read is no matter here.
    """
    lost = [str(record.image) for record in records if not record.image.exists()]
    if lost:
        raise FileNotFoundError(
            f"{len(lost)} of {len(records)} images do not exist, the first is {lost[0]}; {root_option} says what paths "
            "are relative to"
        )


def limit_evenly(records: Sequence[DetectionRecord], limit: int | None) -> list[DetectionRecord]:
    """At most ``limit`` records, in their order: half of either label, of that the same number of every category, and
    of a category's records every n-th. What one cannot fill goes to the others. The choice depends on the records'
    order, labels and categories alone. None takes all.
    """
    if limit is None or limit >= len(records):
        return list(records)
    check(limit > 0, "limit", limit, "positive")
    groups: dict[int, dict[str, list[int]]] = {}
    for i, record in enumerate(records):
        groups.setdefault(record.label, {}).setdefault(record.category, []).append(i)
    chosen: list[int] = []
    shares = _shares([sum(map(len, categories.values())) for categories in groups.values()], limit)
    for categories, share in zip(groups.values(), shares, strict=True):
        members = list(categories.values())
        for own, number in zip(members, _shares([len(m) for m in members], share), strict=True):
            chosen += [own[k * len(own) // number] for k in range(number)]
    return [records[i] for i in sorted(chosen)]


def _shares(sizes: Sequence[int], total: int) -> list[int]:
    """``total`` handed out as evenly as parts that hold at most ``sizes`` allow."""
    shares = [0] * len(sizes)
    smallest_first = sorted(range(len(sizes)), key=lambda i: sizes[i])  # what they cannot take is left to the others
    for done, i in enumerate(smallest_first):
        shares[i] = min(sizes[i], total // (len(sizes) - done))
        total -= shares[i]
    return shares


def _fakes(folder: Path) -> list[DetectionRecord]:
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    records = [_record(entry, 0, FAKE_NAME) for entry in entries if not entry.is_dir() and is_image_name(entry)]
    generators = [entry for entry in entries if entry.is_dir()]
    if not records and not generators:
        raise _empty(folder, f"fake images, or remove it: {REAL_NAME}/ is enough")
    for generator in generators:
        if generator.name == REAL_NAME:
            raise ValueError(f"folder {generator} would be a generator of the name {REAL_NAME!r}; rename it")
        records += _records(generator, 0, generator.name, "this generator's images, or remove it")
    return records


def _records(folder: Path, label: int, category: str, needed: str) -> list[DetectionRecord]:
    """``needed``: see ``_empty``."""
    images = list_images(folder)
    if not images:
        raise _empty(folder, needed)
    return [_record(image, label, category) for image in images]


def _empty(folder: Path, needed: str) -> ValueError:
    """The error of a folder without images; ``needed``: what to put there, or what else to do."""
    return ValueError(f"folder {folder} holds no images; put there {needed}")


def _record(image: Path, label: int, category: str) -> DetectionRecord:
    return DetectionRecord(image, label, category, question="", answer="")
