"""A folder of generated images: whole files, an honest manifest, and nothing foreign replaced."""

import errno
import json
import os
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from unigendet.data.hashes import fingerprint
from unigendet.data.image_folder import ImageFolder, read_manifest, save_image

PICTURE = Image.new("L", (2, 3), 7)


def entry(i, **changes):
    shown = {"file": f"{i}.png", "prompt": f"p{i}", "seed": i, "size": [3, 2], "guidance": {"steps": 4}}
    return shown | {"weights": "w", "model": "m"} | changes


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def add(folder, *entries):
    folder.begin()
    for one in entries:
        folder.add(one, PICTURE, {"prompt": one["prompt"]})


def test_pictures_and_their_entries(tmp_path):
    folder = ImageFolder(tmp_path / "a" / "b")
    add(folder, entry(0), entry(1, prompt="süß"))
    assert files(folder.path) == ["0.png", "1.png", "manifest.jsonl"]
    assert read_manifest(folder.path) == {"0.png": entry(0), "1.png": entry(1, prompt="süß")}
    picture = Image.open(folder.path / "1.png")
    assert picture.info["prompt"] == "süß"
    assert (picture.size, picture.mode, picture.getpixel((1, 2))) == ((2, 3), "L", 7)


def test_what_is_missing(tmp_path):
    add(ImageFolder(tmp_path), entry(0), entry(1), entry(2))
    (tmp_path / "1.png").unlink()
    again = ImageFolder(tmp_path)
    assert again.missing([entry(i) for i in range(4)]) == [1, 3]
    assert again.missing([entry(2, model="elsewhere", size=(3, 2))]) == []  # the same picture, named another way
    again.begin()
    assert list(read_manifest(tmp_path)) == ["0.png", "2.png"]


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (entry(0, prompt="other"), 'its prompt is "p0", not "other"'),
        (entry(0, guidance={"steps": 5}), "its guidance.steps is 4, not 5"),
        (entry(0, seed=3), "its seed is 0, not 3"),
        (entry(0, dtype="float32"), 'its dtype is null, not "float32"'),
        (entry(1), "it is not in the manifest"),
        (entry(2), "it is not in the manifest"),
    ],
)
def test_another_picture_is_not_replaced(tmp_path, asked, why):
    add(ImageFolder(tmp_path), entry(0))
    (tmp_path / "1.png").write_bytes(b"holiday")
    (tmp_path / "2.png").mkdir()
    with pytest.raises(ValueError, match="is there already and is another picture") as error:
        ImageFolder(tmp_path).missing([entry(0), asked])
    assert f"{tmp_path / asked['file']} is there already and is another picture ({why})" in str(error.value)
    assert ImageFolder(tmp_path, overwrite=True).missing([entry(0), asked]) == [1]


def test_overwriting(tmp_path):
    (tmp_path / "1.png").write_bytes(b"holiday")
    folder = ImageFolder(tmp_path, overwrite=True)
    add(folder, entry(1))
    assert Image.open(tmp_path / "1.png").size == (2, 3)
    assert ImageFolder(tmp_path).missing([entry(1)]) == []


def full_disk(self, path, **options):
    Path(path).write_bytes(b"\x89PNG half of")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    add(ImageFolder(tmp_path), entry(0))
    folder = ImageFolder(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full_disk)
        with pytest.raises(OSError, match=r"No space left on device: .*/1\.png"):
            folder.add(entry(1), PICTURE, {})
        with pytest.raises(OSError, match=r"No space left on device: .*/x\.jpg"):
            save_image(tmp_path / "x.jpg", PICTURE, {})
    assert files(tmp_path) == ["0.png", "manifest.jsonl"]
    assert ImageFolder(tmp_path).missing([entry(0), entry(1)]) == [1]


def test_a_picture_never_stands_beside_another_ones_entry(tmp_path, monkeypatch):
    """Killed at any moment of replacing a picture, a run leaves the new one or makes it next time."""
    steps, moments = ((os, "replace"), (os, "unlink"), (os, "fsync"), (Path, "open")), []
    for ended_at in range(99):
        folder_path = tmp_path / str(ended_at)
        add(ImageFolder(folder_path), entry(0))
        old = (folder_path / "0.png").read_bytes()
        folder, calls = ImageFolder(folder_path, overwrite=True), []
        with monkeypatch.context() as patch:
            for owner, name in steps:
                inner = getattr(owner, name)

                def step(*arguments, inner=inner, name=name, calls=calls, ended_at=ended_at, **options):
                    calls.append(name)
                    if len(calls) > ended_at:
                        raise KeyboardInterrupt
                    return inner(*arguments, **options)

                patch.setattr(owner, name, step)
            before = len(moments)
            try:
                folder.add(entry(0, prompt="new"), Image.new("L", (2, 3), 9), {})
            except KeyboardInterrupt:
                moments.append(calls[ended_at])
        there = (folder_path / "0.png").is_file() and (folder_path / "0.png").read_bytes()
        missing = ImageFolder(folder_path, overwrite=True).missing([entry(0, prompt="new")])
        assert missing == ([] if there and there != old else [0])
        if len(moments) == before:  # it ran through
            break
    assert set(moments) == {name for _, name in steps}
    assert missing == []


def test_manifest_cut_short_by_an_interruption(tmp_path):
    add(ImageFolder(tmp_path), entry(0), entry(1))
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes()[:-9])
    assert list(read_manifest(tmp_path)) == ["0.png"]
    folder = ImageFolder(tmp_path, overwrite=True)
    assert folder.missing([entry(0), entry(1)]) == [1]
    add(folder, entry(1))
    assert list(read_manifest(tmp_path)) == ["0.png", "1.png"]
    for damaged in (b"{\n", b"[]\n", b"3\n", b'{"prompt": "a"}\n', b"\xff\n"):
        manifest.write_bytes(json.dumps(entry(0)).encode() + b"\n" + damaged + b"\n")
        with pytest.raises(ValueError, match=r"manifest\.jsonl is no manifest .*; name another folder \(line 2: "):
            ImageFolder(tmp_path)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"my own notes", "line 1: Expecting value"),
        (b'{"file": "a.png", "caption": "mine"}\n', "line 1: it has no prompt, seed, weights"),
        (b'{"file": "a.png", "prompt": "mine", "seed": "1", "weights": "w"}\n', "line 1: it has no seed"),
        (b'{"image": "a.png"}\n{"image": "b.p', "line 1: it has no file, prompt"),
        (b"[1,\n", "line 1: Expecting value"),
    ],
)
def test_a_foreign_manifest_stays(tmp_path, content, why):
    (tmp_path / "manifest.jsonl").write_bytes(content)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="is no manifest of generated pictures; name another folder") as error:
            ImageFolder(tmp_path, overwrite=overwrite)
        assert why in str(error.value)
    assert files(tmp_path) == ["manifest.jsonl"]
    assert (tmp_path / "manifest.jsonl").read_bytes() == content


def test_a_first_line_that_was_cut_is_ours(tmp_path):
    line = json.dumps(entry(0)).encode()
    (tmp_path / "manifest.jsonl").write_bytes(line[:20])
    add(ImageFolder(tmp_path), entry(0))
    assert (tmp_path / "manifest.jsonl").read_bytes() == line + b"\n"


def test_the_manifest_is_ascii_and_takes_any_name(tmp_path):
    add(ImageFolder(tmp_path), entry(0, prompt="süß", images=["\udcff.png"]))
    assert (tmp_path / "manifest.jsonl").read_bytes().isascii()
    assert read_manifest(tmp_path)["0.png"]["images"] == ["\udcff.png"]


def test_an_empty_file_is_made_again(tmp_path):
    """A power cut may leave the name of a picture without its content."""
    add(ImageFolder(tmp_path), entry(0), entry(1))
    (tmp_path / "0.png").write_bytes(b"")
    folder = ImageFolder(tmp_path)
    assert folder.missing([entry(0), entry(1)]) == [0]
    add(folder, entry(0))
    assert Image.open(tmp_path / "0.png").size == (2, 3)


def test_a_picture_gets_its_name_when_it_and_its_entry_are_on_the_disk(tmp_path, monkeypatch):
    folder = ImageFolder(tmp_path)
    folder.begin()
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(f"rename {a}"), replace(a, b)))
    folder.add(entry(0), PICTURE, {})
    partial = tmp_path / ".0.png.partial"
    at = events.index(f"rename {partial}")
    assert set(events[:at]) == {str(partial), str(tmp_path / "manifest.jsonl")}
    assert events[at + 1 :] == [str(tmp_path)]


def test_leftovers_of_a_killed_run_are_replaced(tmp_path):
    (tmp_path / ".0.png.partial").write_bytes(b"half")
    add(ImageFolder(tmp_path), entry(0))
    assert files(tmp_path) == ["0.png", "manifest.jsonl"]


def test_fingerprint_depends_on_contents_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("unigendet.data.hashes._WHOLE", 300)
    monkeypatch.setattr("unigendet.data.hashes._SLICE", 4)
    contents = [b"", b"a", b"a" * 300, b"a" * 301, b"a" * 5000, b"a" * 4999 + b"b", b"b" + b"a" * 4999]
    contents.append(b"a" * 2499 + b"b" * 80 + b"a" * 2421)  # wider than the distance of two slices
    marks = []
    for i, content in enumerate(contents):
        (tmp_path / str(i)).write_bytes(content)
        (tmp_path / "copy").write_bytes(content)
        marks.append(fingerprint([tmp_path / str(i)]))
        assert marks[-1] == fingerprint([tmp_path / "copy"])
    marks.append(fingerprint([tmp_path / "1", tmp_path / "2"]))
    marks.append(fingerprint([tmp_path / "2", tmp_path / "1"]))
    assert all(a != b for a, b in pairwise(sorted(marks)))
    assert all(len(mark) == 16 for mark in marks)
