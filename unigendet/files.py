"""Files and folders that survive a bad day: whole or not there, and on the disk before anything relies on them.

* ``whole_file``, ``write_text``: a file is the old one or the new one at every instant.
* ``new_folder``: a folder appears whole. One that is there already is first renamed to ``.NAME.old``, and stands for
  NAME (``settle`` renames it back) should the process end before the new one has its place.
* ``remove_folder``: a folder is renamed out of the way before the first of its files goes.
* ``replaced_files``: files of a folder that also holds others are exchanged together. They are written beside
  the old ones; then they change places, which is a few renames, and while that lasts the folder carries a mark. What a
  process that ended meanwhile has left, ``finish_replacing`` brings to its end, so one who calls that first finds the
  old files or the new ones. A reader that is still reading when a save comes to its renames may find some of either.
* ``claim_folder``: a folder that a command may write into, and clear, carries the command's mark.

A process that is killed leaves names with a leading dot behind, which the next writer clears away.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

PARTIAL, OLD, GONE = "partial", "old", "gone"
MARK = ".replacing"  # of a folder whose files are just changing places


def beside(path: Path, kind: str) -> Path:
    """The name that ``path`` has while it is being written (``PARTIAL``), replaced (``OLD``) or removed (``GONE``)."""
    return path.with_name(f".{path.name}.{kind}")


@contextmanager
def naming(file: str | Path) -> Iterator[None]:
    """Within it, an OSError that does not say which file it is about says ``file``."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(file)) from error


@contextmanager
def rust_errors(file: str | Path) -> Iterator[None]:
    """Within it, an error that a library written in Rust tells as text (``… (os error 28)``) becomes an OSError."""
    try:
        yield
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None or isinstance(error, OSError):
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from error


def sync(path: str | Path) -> None:
    """Bring what was written to a file, or the names in a folder, onto the disk."""
    with naming(path):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:  # some network filesystems cannot do it for folders
            if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not os.path.isdir(path):
                raise
        finally:
            os.close(handle)


def sync_tree(folder: Path) -> None:
    """``sync`` every file and folder below ``folder``, and itself."""
    for where, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(Path(where) / name)
        sync(where)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, and bring their names onto the disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A path to write a file to, which takes the place of ``path`` when the block ends, brought onto the disk before.

    An error in the block removes it and leaves ``path`` as it was; an OSError names ``path``.
    """
    path = Path(path)
    partial = beside(path, PARTIAL)
    try:
        with naming(path):
            yield partial
            sync(partial)
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == str(partial):
            error.filename = str(path)
        raise
    sync(path.parent)


def write_text(path: str | Path, text: str, errors: str = "strict") -> None:
    """Write a text file (UTF-8, with ``errors`` as ``open`` takes it) whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8", errors=errors)


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of ``path`` as a whole when the block ends.

    An error in the block removes it and leaves ``path`` as it was.
    """
    path = Path(path)
    settle(path)
    partial, old = beside(path, PARTIAL), beside(path, OLD)
    make_folder(partial)
    try:
        with naming(path):
            yield partial
            sync_tree(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if path.exists():
        os.replace(path, old)
    os.replace(partial, path)
    sync(path.parent)
    settle(path)


def remove_folder(path: Path) -> None:
    """Remove a folder; it is whole under its name, or not there under it."""
    gone = beside(path, GONE)
    if gone.exists():
        shutil.rmtree(gone)
    os.replace(path, gone)
    sync(path.parent)
    shutil.rmtree(gone)


def claim_folder(out: Path, mark: str, parts: Sequence[str], *, by: str, note: str) -> None:
    """Make a folder, with a mark, that one kind of job may write into; one that is there already must be such a folder.

    Afterwards the folder holds the mark, parts, and what killed processes left while they wrote parts; nothing else.

    Args:
        out: the folder, as the argument of this name that the job got.
        mark: name of the file that says whose folder it is: without it, it is not the job's, whatever names it holds.
        parts: names of the files and folders that the job leaves.
        by: who leaves such folders, for the error: "a study".
        note: what the mark says to whoever opens it.

    Raises:
        ValueError: ``out`` is a file, or holds something else. Nothing was changed then.
    """
    half = beside(out / mark, PARTIAL)  # what a process that was killed right here leaves
    present = sorted(path.name for path in out.iterdir() if path != half) if out.is_dir() else []
    ours = {mark, *parts, *(beside(out / part, kind).name for part in parts for kind in (PARTIAL, OLD, GONE))}
    foreign = [name for name in present if name not in ours]
    if foreign or (present and mark not in present) or (out.exists() and not out.is_dir()):
        what = f"holds {', '.join((foreign or present)[:5])}" if out.is_dir() else "is a file"
        raise ValueError(f"out is {str(out)!r}, which {what}; it must be a new folder, or one that {by} left")
    make_folder(out)
    write_text(out / mark, note + "\n")


def settle(path: Path) -> None:
    """Clear away what a killed process left beside ``path``, and put the folder back that it was about to replace."""
    partial, old, gone = (beside(path, kind) for kind in (PARTIAL, OLD, GONE))
    for leftover in (partial, gone):
        if leftover.exists():
            shutil.rmtree(leftover)
    if old.exists() and path.exists():
        os.replace(old, gone)  # so that a folder called OLD is always whole
        shutil.rmtree(gone)
    elif old.exists():
        os.replace(old, path)
        sync(path.parent)


@contextmanager
def replaced_files(folder: str | Path, outdated: Sequence[str] = ()) -> Iterator[Path]:
    """A folder to write files into, which come into ``folder`` together when the block ends.

    Args:
        folder: of the files; one that is not there yet appears whole.
        outdated: names and patterns of files that must not stay beside the new ones.
    """
    folder = Path(folder)
    if not folder.exists():
        with new_folder(folder) as partial:
            yield partial
        return
    finish_replacing(folder)
    partial, mark = _partial_files(folder), folder / MARK
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        with naming(folder):
            yield partial
            old = {path.name for pattern in outdated for path in folder.glob(pattern)}
            (partial / MARK).write_text("\n".join(sorted(old - set(os.listdir(partial)))), encoding="utf-8")
            sync_tree(partial)
        os.replace(partial / MARK, mark)
        sync(folder)
    except BaseException:
        mark.unlink(missing_ok=True)  # first, or the files that it stands for would be gone
        with suppress(OSError):
            sync(folder)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finish_replacing(folder)


def finish_replacing(folder: Path) -> None:
    """Bring a ``replaced_files`` that ended while the files changed places to its end: all of them are new then.

    Processes that do it at the same time do not disturb each other.

    Raises:
        OSError: the folder cannot be written to. The mark is still there.
    """
    mark, partial = folder / MARK, _partial_files(folder)
    try:
        outdated = mark.read_text(encoding="utf-8").split("\n")
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in filter(None, outdated):
        (folder / Path(name).name).unlink(missing_ok=True)  # .name: a mark has no say over other folders
    with suppress(FileNotFoundError):  # another process has done it
        for name in sorted(os.listdir(partial)):
            with suppress(FileNotFoundError):
                os.replace(partial / name, folder / name)
        sync(folder)
        partial.rmdir()
    mark.unlink(missing_ok=True)
    sync(folder)


def _partial_files(folder: Path) -> Path:
    """Where ``replaced_files`` collects the new files of a folder."""
    return beside(folder / "files", PARTIAL)
