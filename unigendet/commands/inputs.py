"""Which pictures a command line means: files, folders, patterns and lists."""

from __future__ import annotations

import fnmatch
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from unigendet.commands.common import UserError
from unigendet.data.image_files import IMAGE_SUFFIXES, list_images


def find_pictures(arguments: Sequence[str], list_file: str | None = None) -> list[str]:
    """The paths that ``arguments`` and the lines of ``list_file`` stand for, in that order.

    - A folder stands for the images below it (``list_images``).
    - What does not exist and contains ``*``, ``?`` or ``[`` is a pattern and stands for all that it matches, sorted,
      each once, as if a shell had expanded it. ``**`` is any number of folders, none of them hidden or a link.
    - Anything else stands for itself, whether or not it is there; so does every line of a list.

    Raises UserError for a folder without images, a pattern without matches, and a list that is empty or cannot be read.
    """
    found = [path for argument in arguments for path in _expanded(argument)]
    if list_file is not None:
        found += read_list(list_file)
    return found


def _expanded(argument: str) -> Iterator[str]:
    if os.path.isdir(argument):
        images = list_images(argument)
        if not images:
            suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
            raise UserError(f"no images in {argument} (looked for {suffixes})")
        yield from map(str, images)
    elif _is_pattern(argument) and not os.path.lexists(argument):
        matches = sorted(set(_matches("/" * argument.startswith("/"), [part for part in argument.split("/") if part])))
        paths = (path for match in matches for path in (list_images(match) if os.path.isdir(match) else [Path(match)]))
        unique = dict.fromkeys(map(str, paths))  # ** matches a folder and what is in it
        if not unique:
            raise UserError(f"no file matches the pattern {argument}")
        yield from unique
    else:
        yield argument


def _is_pattern(text: str) -> bool:
    return any(character in text for character in "*?[")


def _matches(folder: str, parts: Sequence[str]) -> Iterator[str]:
    """What matches ``parts`` below ``folder``, which is empty or ends with a slash.

    The standard library's ``**`` follows links, without end where they lead in circles.
    """
    part, rest = parts[0], parts[1:]
    if part == "**":
        if rest:
            yield from _matches(folder, rest)
        for path in _entries(folder, "*"):
            if not os.path.isdir(path):
                yield from () if rest else (path,)
            elif not os.path.islink(path):
                yield from _matches(f"{path}/", parts)
    else:
        paths = _entries(folder, part) if _is_pattern(part) else [folder + part]
        for path in paths:
            if not rest and os.path.lexists(path):
                yield path
            elif rest and os.path.isdir(path):
                yield from _matches(f"{path}/", rest)


def _entries(folder: str, pattern: str) -> list[str]:
    """Hidden names match a pattern that begins with a dot only, as in a shell."""
    try:
        names = os.listdir(folder or ".")
    except OSError:  # a shell too passes over what it may not list
        return []
    shown = [name for name in names if pattern.startswith(".") or not name.startswith(".")]
    return [folder + name for name in shown if fnmatch.fnmatchcase(name, pattern)]


def read_list(file: str) -> list[str]:
    """The paths in ``file`` (``-``: standard input), relative to the current folder like those of the command line.

    One per line, blank lines left out; or, if the file contains a NUL, all that stands between NULs (``find -print0``).
    Raises UserError if it cannot be read or is empty.
    """
    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise UserError(f"the list {file} cannot be read: {error.strerror}") from error
    lines = content.split(b"\0") if b"\0" in content else content.splitlines()
    paths = [os.fsdecode(line) for line in lines if line.strip()]
    if not paths:
        raise UserError(f"the list {file} names no pictures")
    return paths
