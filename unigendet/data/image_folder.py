"""Generated images on disk: a folder of PNGs and its ``manifest.jsonl``, which says what each of them is.

A file appears whole or not at all: it is written under another name and renamed. The order is manifest line, then file,
so a file that is there has its line, however a run ended; a line without its file is made good by the next run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

MANIFEST = "manifest.jsonl"
# Of an entry: where things lay. Not what the picture is, so a moved model or another working directory changes nothing.
PLACES = ("model", "images")
_WHOLE = 64 * 2**20  # bytes; larger files are sampled by ``fingerprint``
_SLICES, _SLICE = 64, 2**18


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path to write to; it becomes ``path`` when the block ends, and nothing is left of it if the block fails.

    Raises:
        OSError: it cannot be written (the disk is full, …); names ``path``.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def save_image(path: Path, image: Image, texts: Mapping[str, str]) -> None:
    """Write an image in the format that its suffix names; a PNG carries ``texts`` as metadata."""
    with written_whole(path) as partial:
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

    Raises ValueError for a line that is no entry; the last one may be cut short, as an interrupted run leaves it.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return {}
    entries: dict[str, dict[str, Any]] = {}
    lines = path.read_bytes().split(b"\n")
    for i, line in enumerate(lines, 1):
        try:
            if line.strip():
                entry = json.loads(line)
                entries[entry["file"]] = entry
        except (ValueError, TypeError, KeyError) as error:
            if i < len(lines):
                raise ValueError(f"{path}, line {i} is no entry of a manifest: {error}") from error
    return entries


class ImageFolder:
    """A folder that images are added to; made if need be.

    Args:
        path: of the folder.
        overwrite: replace pictures that are in the way.

    Raises ValueError for a damaged manifest, OSError if the folder cannot be made.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False) -> None:
        self.path, self._overwrite = Path(path), overwrite
        self.path.mkdir(parents=True, exist_ok=True)
        self._entries = {name: e for name, e in read_manifest(path).items() if (self.path / name).is_file()}

    def missing(self, entries: Sequence[Mapping[str, Any]]) -> list[int]:
        """Which of ``entries`` are still to be made: those whose file is not there.

        A file that is there with the same entry in the manifest is the picture asked for, and stays.
        Raises ValueError for any other file in the way, unless they are to be overwritten; names it.
        """
        found = []
        for i, entry in enumerate(entries):
            path = self.path / entry["file"]
            if path.exists():
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
        lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in self._entries.values()]
        with written_whole(self.path / MANIFEST) as partial:
            partial.write_text("".join(lines), encoding="utf-8")

    def add(self, entry: Mapping[str, Any], image: Image, texts: Mapping[str, str]) -> Path:
        """Save an image under ``entry["file"]`` and its entry in the manifest; a PNG carries ``texts`` as metadata."""
        path = self.path / entry["file"]
        with written_whole(path) as partial:
            _save(image, partial, path.suffix, texts)
            path.unlink(missing_ok=True)  # or the old picture would have the new one's line for a moment
            with (self.path / MANIFEST).open("a", encoding="utf-8") as manifest:
                manifest.write(json.dumps(entry, ensure_ascii=False) + "\n")
        return path


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


def fingerprint(files: Sequence[str | Path]) -> str:
    """A hash of files' contents, 16 hexadecimal digits; of a large file, its size and 64 slices spread over it.

    That a model was trained on changes every slice of its weights, so reading 16 MiB of a shard is enough to notice.
    """
    digest = hashlib.sha256()
    for file in files:
        with Path(file).open("rb") as stream:
            size = stream.seek(0, 2)
            digest.update(size.to_bytes(8, "little"))
            whole = size <= _WHOLE
            for i in range(1 if whole else _SLICES):
                stream.seek(0 if whole else i * (size - _SLICE) // (_SLICES - 1))
                digest.update(stream.read(size if whole else _SLICE))
    return digest.hexdigest()[:16]
