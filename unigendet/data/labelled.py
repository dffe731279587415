"""Labelled images, from either of the two forms in which users keep them, as detection records."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from unigendet.data.datasets import DetectionRecord, read_detection
from unigendet.data.image_files import is_image_name, list_images

REAL_NAME, FAKE_NAME = "real", "fake"
VERDICTS = ("This is a fake image.", "This is a real image.")  # indexed by label; what ``parse_verdict`` reads
_FORM = (
    f"it must hold images in {REAL_NAME}/, {FAKE_NAME}/ or both, those in {FAKE_NAME}/ in one sub-folder per generator "
    "or directly"
)


def read_labelled(path: str | Path, *, image_root: str | Path | None = None) -> list[DetectionRecord]:
    """Read labelled images.

    Args:
        path: a FakeClue annotation file (see ``unigendet.data.datasets``); or a folder with ``real/`` and ``fake/``,
            or one of them. Images are looked for at any depth (``unigendet.data.image_files.list_images``).
        image_root: of an annotation file: what its paths are relative to; default: the file's folder.

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
        return read_detection(path, image_root)
    if image_root is not None:
        raise ValueError(f"image_root is {str(image_root)!r}; it must be None where {path} is a folder")
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    folders = [entry.name for entry in entries if entry.is_dir()]
    others = [entry.name for entry in entries if entry.is_file() and is_image_name(entry)]
    others += [f"{name}/" for name in folders if name not in (REAL_NAME, FAKE_NAME)]
    if others or not folders:
        raise ValueError(f"folder {path} holds {', '.join(others) or 'no sub-folders'}; {_FORM}")
    records = _records(path / REAL_NAME, 1, REAL_NAME) if REAL_NAME in folders else []
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


def _fakes(folder: Path) -> list[DetectionRecord]:
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    records = [_record(entry, 0, FAKE_NAME) for entry in entries if not entry.is_dir() and is_image_name(entry)]
    generators = [entry for entry in entries if entry.is_dir()]
    if not records and not generators:
        raise ValueError(f"folder {folder} holds no images; {_FORM}")
    for generator in generators:
        if generator.name == REAL_NAME:
            raise ValueError(f"folder {generator} would be a generator of the name {REAL_NAME!r}; rename it")
        records += _records(generator, 0, generator.name)
    return records


def _records(folder: Path, label: int, category: str) -> list[DetectionRecord]:
    images = list_images(folder)
    if not images:
        raise ValueError(f"folder {folder} holds no images; {_FORM}")
    return [_record(image, label, category) for image in images]


def _record(image: Path, label: int, category: str) -> DetectionRecord:
    return DetectionRecord(image, label, category, question="", answer="")
