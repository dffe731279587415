"""Files and folders at every instant of being written: each step a process could be killed before is tried."""

import errno
import os
import shutil

import pytest

from unigendet import files
from unigendet.files import (
    finish_replacing,
    naming,
    new_folder,
    remove_folder,
    replaced_files,
    rust_errors,
    settle,
    sync,
    whole_file,
    write_text,
)
from unigendet.model.settings import require_whole
from unigendet.model.shards import CheckpointError
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


BEFORE = {"a": "old", "b": "old", "old-1": "old", "other": "old"}
AFTER = {"a": "new", "b": "new", "c": "new", "other": "old"}


def old_save(folder):
    folder.mkdir()
    for name, text in BEFORE.items():
        (folder / name).write_text(text)


def new_save(folder, error=None):
    with replaced_files(folder, ["old-*"]) as new:
        for name in ("a", "b", "c"):
            (new / name).write_text("new")
            if error is not None:
                raise error


def interrupted(folder):
    return (folder / files.MARK).exists()


def shown(folder):
    return {name: text for name, text in content(folder).items() if not name.startswith(".")}


def test_replaced_files_are_old_or_new_once_recovered(tmp_path, monkeypatch):
    """Wherever the process was killed; what else the folder holds stays, and a save that then fails loses nothing."""
    seen = []
    for number in range(1, 99):
        folder = tmp_path / str(number)
        old_save(folder)
        ended = killed_at(monkeypatch, lambda folder=folder: new_save(folder), number)
        marked = interrupted(folder)
        assert marked or shown(folder) in (BEFORE, AFTER)
        shutil.copytree(folder, tmp_path / "full")
        finish_replacing(folder)
        assert not interrupted(folder)
        assert shown(folder) in (BEFORE, AFTER)
        seen.append((shown(folder) == AFTER, marked))
        with pytest.raises(OSError, match="No space"):  # in the save that comes instead of a reader
            new_save(tmp_path / "full", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        assert content(tmp_path / "full") == shown(folder)
        shutil.rmtree(tmp_path / "full")
        new_save(folder)
        assert content(folder) == AFTER
        if not ended:
            break
    assert [new for new, _ in seen] == sorted(new for new, _ in seen)  # once new, always new
    assert set(seen) == {(False, False), (True, True), (True, False)}


def test_recovering_can_be_killed_too(tmp_path, monkeypatch):
    """At any step, after any step at which the save was; then it is done again."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # counted all the same; so many would take long
    pairs = 0
    for first in range(1, 99):
        for second in range(1, 99):
            folder = tmp_path / f"{first}-{second}"
            old_save(folder)
            saving = killed_at(monkeypatch, lambda folder=folder: new_save(folder), first)
            expected = AFTER if interrupted(folder) else shown(folder)
            recovering = killed_at(monkeypatch, lambda folder=folder: finish_replacing(folder), second)
            finish_replacing(folder)
            assert shown(folder) == expected
            pairs += recovering
            if not recovering:
                break
        if not saving:
            break
    assert pairs > 20


def test_an_error_right_after_the_mark_leaves_the_old_files(tmp_path, monkeypatch):
    """As Ctrl-C or a failing disk may: the new files go, so the mark must go before them."""
    for error in (KeyboardInterrupt(), OSError(errno.EIO, os.strerror(errno.EIO))):
        folder = tmp_path / type(error).__name__
        old_save(folder)

        def fail(path, folder=folder, error=error):
            if interrupted(folder):
                raise error
            sync(path)

        with monkeypatch.context() as patch:
            patch.setattr(files, "sync", fail)
            with pytest.raises(type(error)):
                new_save(folder)
        assert content(folder) == BEFORE
        finish_replacing(folder)
        assert content(folder) == BEFORE


def test_several_processes_finish_the_same_save(tmp_path, monkeypatch):
    """Each may find that another has just moved a file, or is through."""
    replace = os.replace
    for number in range(1, 99):
        folder = tmp_path / str(number)
        old_save(folder)
        if not killed_at(monkeypatch, lambda folder=folder: new_save(folder), number):
            break
        if not interrupted(folder):
            continue

        def other(source, target, folder=folder):
            with monkeypatch.context() as inner:
                inner.setattr(os, "replace", replace)
                finish_replacing(folder)
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", other)
            finish_replacing(folder)
        assert content(folder) == AFTER


def test_a_reader_finishes_or_says_why_it_cannot(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    for number in range(1, 99):
        old_save(folder)
        killed_at(monkeypatch, lambda: new_save(folder), number)
        if interrupted(folder):
            break
        shutil.rmtree(folder)
    before = content(folder)

    def refuse(*args, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(folder))

    with monkeypatch.context() as patch:
        for name in ("replace", "unlink"):
            patch.setattr(os, name, refuse)
        with pytest.raises(CheckpointError, match=r"cannot be finished now \(.*Read-only file system"):
            require_whole(folder)
    assert content(folder) == before
    require_whole(folder)
    assert content(folder) == AFTER


def test_a_mark_has_no_say_over_other_folders(tmp_path):
    old_save(tmp_path / "model")
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "model" / files.MARK).write_text("../mine\n/etc/hostname\nold-1")
    finish_replacing(tmp_path / "model")
    assert (tmp_path / "mine").read_text() == "mine"
    assert content(tmp_path / "model") == dict.fromkeys(("a", "b", "other"), "old")


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
    with pytest.raises(OSError, match="No space left on device: 'y'") as caught, rust_errors("y"):
        raise Exception("while serializing: no room (os error 28)")
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(ZeroDivisionError), rust_errors("y"):
        _ = 1 / 0


def test_settle_leaves_strangers_alone(tmp_path):
    make(tmp_path / "step-7", "new")
    (tmp_path / ".step-7.notes").write_text("mine")
    settle(tmp_path / "step-7")
    assert (tmp_path / ".step-7.notes").read_text() == "mine"
    assert files.MARK.startswith(".")
