"""Generated images on disk: a folder of PNGs and its ``manifest.jsonl``, which says what each of them is.

A file appears whole or not at all: it is written under another name and renamed. The order on the disk is manifest
line, then file, so a file that is there has its line, however a run ended; a line without its file is made good by the
next run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unigendet.files import make_folder, naming, sync, whole_file, write_text

if TYPE_CHECKING:
    from PIL.Image import Image

MANIFEST = "manifest.jsonl"
KINDS = {"file": str, "prompt": str, "seed": int, "weights": str}  # what every entry has
BEGINNING = b'{"file": "'  # of every line
# Of an entry: where things lay. Not what the picture is, so a moved model or another working directory changes nothing.
PLACES = ("model", "images")


def save_image(path: Path, image: Image, texts: Mapping[str, str]) -> None:
    """Write an image in the format that its suffix names; a PNG carries ``texts`` as metadata."""
    with whole_file(path) as partial:
        _save(image, partial, path.suffix, texts)


def _save(image: Image, partial: Path, suffix: str, texts: Mapping[str, str]) -> None:
    from PIL import Image as images
    from PIL.PngImagePlugin import PngInfo

    kind = images.registered_extensions()[suffix.lower()]
    options = {}
    if kind == "PNG":
        options["pnginfo"] = info = PngInfo()
        for key, text in texts.items():
            info.add_itxt(key, text)
    image.save(partial, format=kind, **options)


def read_manifest(folder: str | Path) -> dict[str, dict[str, Any]]:
    """The entries of a folder's manifest by file name, the last of each file; empty without a manifest.

    Raises ValueError for a line that is no entry: the file may be somebody else's. The last one may be cut short, as an
    interrupted run leaves it.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return {}
    entries: dict[str, dict[str, Any]] = {}
    lines = path.read_bytes().split(b"\n")
    for i, line in enumerate(lines, 1):
        try:
            entry = json.loads(line) if line.strip() else None
        except ValueError as error:
            if i == len(lines) and (entries or line.startswith(BEGINNING)):
                break
            raise _foreign(path, i, str(error)) from error
        if line.strip():
            values = entry if isinstance(entry, dict) else {}
            lacks = [key for key, kind in KINDS.items() if type(values.get(key)) is not kind]
            if lacks:
                raise _foreign(path, i, f"it has no {', '.join(lacks)}")
            entries[entry["file"]] = entry
    return entries


def _foreign(path: Path, line: int, why: str) -> ValueError:
    return ValueError(f"{path} is no manifest of generated pictures; name another folder (line {line}: {why})")


def _is_there(path: Path) -> bool:
    """Whether there is a file with content; an empty one is what a power cut may leave."""
    return path.is_file() and path.stat().st_size > 0


class ImageFolder:
    """A folder that images are added to; made if need be.

    Args:
        path: of the folder.
        overwrite: replace pictures that are in the way.

    Raises ValueError for a manifest that is damaged or not ours, OSError if the folder cannot be made.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False) -> None:
        self.path, self._overwrite = Path(path), overwrite
        make_folder(self.path)
        self._entries = {name: e for name, e in read_manifest(path).items() if _is_there(self.path / name)}

    def missing(self, entries: Sequence[Mapping[str, Any]]) -> list[int]:
        """Which of ``entries`` are still to be made: those whose file is not there, or is empty.

        A file that is there with the same entry in the manifest is the picture asked for, and stays.
        Raises ValueError for any other file in the way, unless they are to be overwritten; names it.
        """
        found = []
        for i, entry in enumerate(entries):
            path = self.path / entry["file"]
            if path.is_dir() or _is_there(path):
                there = self._entries.get(entry["file"])
                why = "it is not in the manifest" if there is None else _difference(there, entry)
                if not why:
                    continue
                if not self._overwrite:
                    raise ValueError(
                        f"{path} is there already and is another picture ({why}); name another folder, or overwrite"
                    )
            found.append(i)
        return found

    def begin(self) -> None:
        """Write the manifest anew, without lines of files that are gone, before images are added."""
        write_text(self.path / MANIFEST, "".join(map(_line, self._entries.values())))

    def add(self, entry: Mapping[str, Any], image: Image, texts: Mapping[str, str]) -> Path:
        """Save an image under ``entry["file"]`` and its entry in the manifest; a PNG carries ``texts`` as metadata."""
        path, manifest = self.path / entry["file"], self.path / MANIFEST
        with whole_file(path) as partial:
            _save(image, partial, path.suffix, texts)
            sync(partial)
            if path.exists():  # or the old picture would have the new one's line for a moment
                path.unlink()
                sync(self.path)
            with naming(manifest), manifest.open("a", encoding="utf-8") as lines:
                lines.write(_line(entry))
                lines.flush()
                os.fsync(lines.fileno())
        return path


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry) + "\n"  # ASCII: half a surrogate pair in a path is no reason to stop


def _difference(there: Mapping[str, Any], asked: Mapping[str, Any], prefix: str = "") -> str:
    """What differs between an entry of the manifest and one that is asked for; empty if nothing does."""
    asked = json.loads(json.dumps(asked))  # tuples become lists
    for key in dict.fromkeys((*asked, *there)):
        old, new = there.get(key), asked.get(key)
        if key not in PLACES and old != new:
            if isinstance(old, dict) and isinstance(new, dict):
                return _difference(old, new, f"{key}.")
            return f"its {prefix}{key} is {_short(old)}, not {_short(new)}"
    return ""


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
