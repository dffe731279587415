"""Prompt files: what images to make, one prompt a line or as JSON.

- ``*.json``: a list whose entries are strings or objects. An object has ``prompt`` and may have ``seed``, ``size``
  ([height, width] in pixels), ``images`` (input images, see ``unigendet.inference.requests``) and ``image_path``, the
  real image that a LAION annotation describes, below the image root: a reference to compare with, which generation does
  not look at. Beside ``image_path`` there may be other keys; elsewhere they are errors.
- ``*.jsonl``: the same entries, one a line.
- Anything else is text: one prompt a line, without the white space around it; blank lines and lines that begin with
  ``#`` are left out. A prompt that begins with ``#`` is written in JSON.

Files are UTF-8. The readers are strict: whatever is wrong is an error that names the file, the entry and the field.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEYS = ("prompt", "seed", "size", "images", "image_path")


@dataclass(frozen=True)
class PromptRecord:
    """One entry of a prompt file; ``where`` is what errors call it.

    ``seed``, ``size`` (height, width): None if the file does not say. ``images``: input images. ``reference``: the real
    image that the prompt describes.
    """

    prompt: str
    seed: int | None = None
    size: tuple[int, int] | None = None
    images: tuple[Path, ...] = ()
    reference: Path | None = None
    where: str = ""


def read_prompts(file: str | Path, image_root: str | Path | None = None) -> list[PromptRecord]:
    """Read a prompt file.

    Args:
        file: its suffix says which form it has.
        image_root: what image paths are relative to; default: the file's folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8, holds no prompt, or an entry is malformed.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"prompt file {file} does not exist")
    root = file.parent if image_root is None else Path(image_root)
    return parse_prompts(file.read_bytes(), str(file), root)


def parse_prompts(content: bytes, name: str, root: Path) -> list[PromptRecord]:
    """The prompts of a file's content; the suffix of ``name`` says which form it has. Errors as in ``read_prompts``."""
    try:
        text = content.decode("utf-8-sig")  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{name}, line {line} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    form = {".json": _json_list, ".jsonl": _json_lines}.get(Path(name).suffix.lower(), _text_lines)
    records = [_record(entry, where, root) for entry, where in form(text, name)]
    if not records:
        raise ValueError(f"{name} holds no prompt")
    return records


def _json_list(text: str, name: str) -> Iterator[tuple[Any, str]]:
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}, line {error.lineno} is not JSON: {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"{name} holds a {type(entries).__name__}; it must hold a list of prompts")
    for i, entry in enumerate(entries):
        yield entry, f"{name}, entry {i}"


def _json_lines(text: str, name: str) -> Iterator[tuple[Any, str]]:
    for i, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line), f"{name}, line {i}"
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}, line {i} is not JSON: {error.msg} at column {error.colno}") from error


def _text_lines(text: str, name: str) -> Iterator[tuple[Any, str]]:
    for i, line in enumerate(text.split("\n"), 1):
        if line.strip() and not line.startswith("#"):
            yield line.strip(), f"{name}, line {i}"


def _record(entry: Any, where: str, root: Path) -> PromptRecord:
    if isinstance(entry, str):
        entry = {"prompt": entry}
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {_short(entry)}; it must be a string or an object with the key 'prompt'")
    unknown = sorted(set(entry) - set(KEYS))
    if unknown and "image_path" not in entry:  # an annotation may say more than is needed here
        raise ValueError(f"{where} has the unknown keys {unknown}; there are {list(KEYS)}")

    def need(fits: bool, key: str, must: str) -> None:
        if not fits:
            raise ValueError(f"{where}, {key!r} is {_short(entry.get(key))}; it must be {must}")

    prompt, seed, size = entry.get("prompt"), entry.get("seed"), entry.get("size")
    images, reference = entry.get("images", []), entry.get("image_path")
    need(isinstance(prompt, str) and bool(prompt.strip()), "prompt", "a text that is not blank")
    need(is_text(prompt), "prompt", "Unicode text, without a lone surrogate")
    need(seed is None or (type(seed) is int and seed >= 0), "seed", "a whole number from 0")
    pair = isinstance(size, list) and len(size) == 2 and all(type(side) is int for side in size)
    need(size is None or pair, "size", "[height, width] in pixels")
    need(isinstance(images, list) and all(map(_is_path, images)), "images", "a list of paths")
    need(reference is None or _is_path(reference), "image_path", "a path")
    below = reference is None or not (Path(reference).is_absolute() or ".." in Path(reference).parts)
    need(below, "image_path", "a path below the image root")
    return PromptRecord(
        prompt,
        seed,
        (size[0], size[1]) if size else None,
        tuple(root / image for image in images),
        None if reference is None else root / reference,
        where,
    )


def is_text(text: str) -> bool:
    """Whether a string is Unicode text: a lone surrogate, as an undecodable byte of a command line becomes, is none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
