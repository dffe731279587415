"""A folder of generated images: whole files, an honest manifest, and nothing foreign replaced."""

import errno
import json
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from unigendet.data.image_folder import ImageFolder, fingerprint, read_manifest, save_image, written_whole

PICTURE = Image.new("L", (2, 3), 7)


def entry(i, **changes):
    return {"file": f"{i}.png", "prompt": f"p{i}", "size": [3, 2], "guidance": {"steps": 4}, "model": "m"} | changes


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
        ({"file": "0.png", **entry(0), "seed": 3}, "its seed is null, not 3"),
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
        with pytest.raises(OSError, match=r"1\.png cannot be written: .*No space left on device"):
            folder.add(entry(1), PICTURE, {})
        with pytest.raises(OSError, match=r"x\.jpg cannot be written: .*No space left on device"):
            save_image(tmp_path / "x.jpg", PICTURE, {})
    assert files(tmp_path) == ["0.png", "manifest.jsonl"]
    assert ImageFolder(tmp_path).missing([entry(0), entry(1)]) == [1]


def test_a_picture_never_stands_beside_another_ones_entry(tmp_path, monkeypatch):
    """Killed at any moment of replacing a picture, a run leaves the new one or makes it next time."""
    steps, moments = ("replace", "unlink", "open"), []
    for ended_at in range(9):
        folder_path = tmp_path / str(ended_at)
        add(ImageFolder(folder_path), entry(0))
        old = (folder_path / "0.png").read_bytes()
        folder, calls = ImageFolder(folder_path, overwrite=True), []
        with monkeypatch.context() as patch:
            for name in steps:
                inner = getattr(Path, name)

                def step(self, *arguments, inner=inner, name=name, calls=calls, ended_at=ended_at, **options):
                    calls.append(name)
                    if len(calls) > ended_at:
                        raise KeyboardInterrupt
                    return inner(self, *arguments, **options)

                patch.setattr(Path, name, step)
            try:
                folder.add(entry(0, prompt="new"), Image.new("L", (2, 3), 9), {})
            except KeyboardInterrupt:
                moments.append(calls[ended_at])
        there = (folder_path / "0.png").is_file() and (folder_path / "0.png").read_bytes()
        missing = ImageFolder(folder_path, overwrite=True).missing([entry(0, prompt="new")])
        assert missing == ([] if there and there != old else [0])
    assert set(moments) == set(steps)
    assert len(moments) < 9  # the last one ran through


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
        with pytest.raises(ValueError, match=r"manifest\.jsonl, line 2 is no entry of a manifest"):
            ImageFolder(tmp_path)


def test_leftovers_of_a_killed_run_are_replaced(tmp_path):
    (tmp_path / ".0.png.partial").write_bytes(b"half")
    add(ImageFolder(tmp_path), entry(0))
    assert files(tmp_path) == ["0.png", "manifest.jsonl"]


def test_written_whole_keeps_the_old_file_if_the_new_one_fails(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")

    def interrupted():
        with written_whole(path) as partial:
            partial.write_text("ne")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert (path.read_text(), files(tmp_path)) == ("old", ["x.txt"])
    with written_whole(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "new"
    with pytest.raises(OSError, match=r"lost/x cannot be written"), written_whole(tmp_path / "lost" / "x") as partial:
        partial.write_text("a")


def test_fingerprint_depends_on_contents_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("unigendet.data.image_folder._WHOLE", 300)
    monkeypatch.setattr("unigendet.data.image_folder._SLICE", 4)
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
