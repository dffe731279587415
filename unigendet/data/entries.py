"""The entries of annotation files: JSON lists of objects, whose paths are relative to an image root."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Malformed:
    """What is wrong with one entry of an annotation file: the file, the entry's index, and the error's text."""

    file: str
    entry: int
    reason: str


@dataclass(frozen=True)
class Entry:
    """One object of an annotation file, with the name that errors call it by, and what its paths are relative to."""

    values: dict[str, Any]
    where: str
    root: Path

    def get(self, field: str) -> Any:
        """The value of ``field``, whatever it is."""
        if field not in self.values:
            raise ValueError(f"{self.where} has no field {field!r}; it has {sorted(self.values)}")
        return self.values[field]

    def text(self, field: str) -> str:
        """A field that is a text and not empty."""
        value = self.get(field)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{self.where}, field {field!r} is {value!r}; it must be a non-empty string")
        return value

    def path(self, field: str) -> Path:
        """A field that is a path below the root."""
        value = Path(self.text(field))
        if not value.is_absolute() and ".." not in value.parts:
            return self.root / value
        what = f"{self.where}, field {field!r} is {str(value)!r}"
        if ".." in value.parts:
            raise ValueError(f"{what}; it must be a path below image_root, without '..'")
        root = Path(os.path.abspath(self.root))
        if value.is_relative_to(root):
            how = f": write {str(value.relative_to(root))!r}"
        else:
            how = f"; or set image_root to '/' and write {str(value.relative_to(value.anchor))!r}"
        raise ValueError(f"{what}; it must be a path relative to image_root, which is {str(root)!r}{how}")


Reader = Callable[[Entry], Any]  # what reads something from an entry; raises ValueError


def sound_entries(
    file: str | Path, image_root: str | Path | None, malformed: list[Malformed] | None, readers: Sequence[Reader]
) -> Iterator[tuple[str, list[Any]]]:
    """The entries of an annotation file: the place of each, and what ``readers`` make of it.

    Args:
        file: a JSON list of objects, in UTF-8.
        image_root: what image paths are relative to; default: the file's folder.
        malformed: takes everything that is wrong with any entry, which is then left out; None: the first mistake is
            raised.
        readers: one for each thing to be read from an entry.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file or an entry is malformed, or none is sound; names the file, the entry and the field.
    """
    root, none_is_sound = Path(file).parent if image_root is None else Path(image_root), True
    for i, values in enumerate(_entries(file)):
        entry, read, sound = Entry(values, f"{file}, entry {i}", root), [], True
        for reader in readers if isinstance(values, dict) else (_refuse,):
            try:
                read.append(reader(entry))
            except ValueError as error:
                if malformed is None:
                    raise
                malformed.append(Malformed(str(file), i, str(error)))
                sound = False
        if sound:
            none_is_sound = False
            yield entry.where, read
    if none_is_sound:
        raise ValueError(f"annotation file {file} has no sound entry")


def _entries(file: str | Path) -> list[Any]:
    if Path(file).is_dir():
        raise FileNotFoundError(f"annotation file {file} is a folder; it must be a JSON file")
    if not Path(file).is_file():
        raise FileNotFoundError(f"annotation file {file} does not exist")
    text = ""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
        entries = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        if _is_json_lines(text):
            raise ValueError(
                f"annotation file {file} looks like JSON lines, an object a line; it must hold one list of objects: "
                "[ and ] around them and commas between them, as 'jq -s .' writes it"
            ) from error
        raise ValueError(f"annotation file {file} is not JSON: {error}; it must hold one list of objects") from error
    if not isinstance(entries, list) or not entries:
        have = "an empty list" if entries == [] else f"a {type(entries).__name__}"
        raise ValueError(f"annotation file {file} holds {have}; it must hold a non-empty list")
    return entries


def _is_json_lines(text: str) -> bool:
    """Whether the first line is a whole JSON object."""
    try:
        return isinstance(json.loads(text.lstrip().partition("\n")[0]), dict)
    except json.JSONDecodeError:
        return False


def _refuse(entry: Entry) -> None:
    raise ValueError(f"{entry.where} is a {type(entry.values).__name__}; it must be an object")
