"""Files and folders at every instant of being written: each step a process could be killed before is tried."""

import errno
import os
import shutil

import pytest

from unigendet import files
from unigendet.files import (
    interrupted,
    naming,
    new_folder,
    remove_folder,
    replaced_files,
    settle,
    telling,
    whole_file,
    write_text,
)
from unigendet.training.state import checkpoints, clear_leftovers

STEPS = ("replace", "unlink", "rmdir", "mkdir", "fsync")  # of os: what changes the disk, or waits for it


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it counts, cleaning up included."""


def killed_at(monkeypatch, action, number):
    """Run ``action``; from its ``number``-th step on the disk on, nothing it does has an effect. Whether it came so
    far."""
    count = 0
    with monkeypatch.context() as patch:
        for name in STEPS:
            inner = getattr(os, name)

            def step(*args, _inner=inner, **options):
                nonlocal count
                count += 1
                if count >= number:
                    raise Killed
                return _inner(*args, **options)

            patch.setattr(os, name, step)
        try:
            action()
        except Killed:
            return True
    return False


def content(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def fill(folder, text):
    (folder / "inner").mkdir()
    for name in ("a", "inner/b"):
        (folder / name).write_text(text)


def make(path, text):
    with new_folder(path) as folder:
        fill(folder, text)


OLD, NEW = ({"a": text, "inner/b": text} for text in ("old", "new"))


def test_a_new_folder_is_whole_or_not_there(tmp_path, monkeypatch):
    output, states = tmp_path / "run", set()
    for number in range(1, 99):
        path = output / "checkpoints" / "step-7"
        ended = killed_at(monkeypatch, lambda path=path: make(path, "new"), number)
        found = checkpoints(output)
        assert all(content(p) == NEW for p in found)
        states.add(len(found))
        clear_leftovers(output)
        assert checkpoints(output) == found
        if not ended:
            break
        shutil.rmtree(output, ignore_errors=True)
    assert number > 8
    assert states == {0, 1}


def test_a_replaced_folder_is_there_at_every_instant(tmp_path, monkeypatch):
    """The old one or the new one, whole, also between the renames, and after clearing up."""
    output, seen = tmp_path / "run", []
    for number in range(1, 99):
        path = output / "checkpoints" / "step-7"
        make(path, "old")
        ended = killed_at(monkeypatch, lambda path=path: make(path, "new"), number)
        (found,) = checkpoints(output)
        before = content(found)
        seen.append("old" if before == OLD else "new")
        assert before in (OLD, NEW)
        clear_leftovers(output)
        assert checkpoints(output) == [path]
        assert content(path) == before
        assert list(path.parent.iterdir()) == [path]
        if not ended:
            break
        shutil.rmtree(output)
    assert seen == sorted(seen, reverse=True)  # once new, always new
    assert set(seen) == {"old", "new"}


def test_a_removed_folder_is_whole_while_it_is_listed(tmp_path, monkeypatch):
    output, states = tmp_path / "run", set()
    for number in range(1, 99):
        path = output / "checkpoints" / "step-7"
        make(path, "old")
        ended = killed_at(monkeypatch, lambda path=path: remove_folder(path), number)
        found = checkpoints(output)
        assert all(content(p) == OLD for p in found)
        states.add(len(found))
        clear_leftovers(output)
        assert checkpoints(output) == found == list(path.parent.iterdir())
        if not ended:
            break
        shutil.rmtree(output)
    assert states == {0, 1}


def test_replaced_files_never_mix(tmp_path, monkeypatch):
    """Old, new, or marked as interrupted; what else the folder holds stays."""
    seen = set()
    for number in range(1, 99):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in ("a", "b", "old-1", "other"):
            (folder / name).write_text("old")

        def save(folder=folder):
            with replaced_files(folder, ["old-*"]) as new:
                for name in ("a", "b", "c"):
                    (new / name).write_text("new")

        old = {"a": "old", "b": "old", "old-1": "old", "other": "old"}
        new = {"a": "new", "b": "new", "c": "new", "other": "old"}
        ended = killed_at(monkeypatch, save, number)
        now = {name: text for name, text in content(folder).items() if not name.startswith(".")}
        seen.add("interrupted" if interrupted(folder) else "old" if now == old else "new")
        assert interrupted(folder) or now in (old, new)
        assert now["other"] == "old"
        save()
        assert content(folder) == new
        assert not interrupted(folder)
        if not ended:
            break
    assert seen == {"old", "interrupted", "new"}


def test_files_of_a_new_folder_appear_together(tmp_path):
    def half():
        with replaced_files(tmp_path / "model") as new:
            (new / "a").write_text("half")
            raise Killed

    with pytest.raises(Killed):
        half()
    assert not list(tmp_path.iterdir())
    with replaced_files(tmp_path / "model") as new:
        (new / "a").write_text("whole")
    assert content(tmp_path) == {"model/a": "whole"}


def test_a_file_is_the_old_one_if_the_new_one_fails(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")

    def interrupted():
        with whole_file(path) as partial:
            partial.write_text("ne")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert content(tmp_path) == {"x.txt": "old"}
    with whole_file(path) as partial:
        partial.write_bytes(b"new")
        assert path.read_text() == "old"
    assert content(tmp_path) == {"x.txt": "new"}
    lost = tmp_path / "lost" / "x"
    with pytest.raises(FileNotFoundError) as error, whole_file(lost) as partial:
        partial.write_text("a")
    assert error.value.filename == str(lost)
    write_text(path, "\udcff", errors="backslashreplace")
    assert path.read_bytes() == b"\\udcff"


def test_a_text_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    file, seen = tmp_path / "metrics.jsonl", set()
    for number in range(1, 9):
        write_text(file, "old")
        ended = killed_at(monkeypatch, lambda: write_text(file, "new"), number)
        seen.add(file.read_text())
        if not ended:
            break
    assert seen == {"old", "new"}
    assert not list(tmp_path.glob(".*"))


def test_everything_is_synced_before_it_gets_its_name(tmp_path, monkeypatch):
    """A power cut may lose what was only written; so files, then their folders, then the rename, then its folder."""
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(f"rename {a}"), replace(a, b)))
    make(tmp_path / "step-7", "new")
    partial = tmp_path / ".step-7.partial"
    at = events.index(f"rename {partial}")
    assert events[at - 4 : at] == [str(partial / name) for name in ("inner/b", "inner", "a", ".")]
    assert events[at + 1 :] == [str(tmp_path)]


def test_an_error_says_which_file_it_is_about(tmp_path):
    with pytest.raises(OSError, match=r"No space left on device: 'x'"), naming("x"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(FileNotFoundError, match="lost"), naming("x"):
        (tmp_path / "lost").read_text()
    with pytest.raises(OSError, match="No space left on device: 'y'") as caught, telling("y"):
        raise Exception("while serializing: no room (os error 28)")
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(ZeroDivisionError), telling("y"):
        _ = 1 / 0


def test_settle_leaves_strangers_alone(tmp_path):
    make(tmp_path / "step-7", "new")
    (tmp_path / ".step-7.notes").write_text("mine")
    settle(tmp_path / "step-7")
    assert (tmp_path / ".step-7.notes").read_text() == "mine"
    assert files.MARK.startswith(".")
