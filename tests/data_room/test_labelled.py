"""Labelled images from an annotation file or from real/ and fake/, and how folders are listed."""

import json
import os

import pytest

from unigendet.data import image_files
from unigendet.data.image_files import list_images
from unigendet.data.labelled import read_labelled


def make(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def rows(records, folder):
    return [(str(r.image.relative_to(folder)), r.label, r.category) for r in records]


def test_folders(tmp_path):
    make(tmp_path, "real/b.png", "real/camera/a.jpg", "fake/sd/2.png", "fake/sd/deep/1.PNG", "fake/gan/x.webp",
         "fake/loose.png", "real/notes.txt", "README.md", ".hidden/x.png")  # fmt: skip
    records = read_labelled(tmp_path)
    assert rows(records, tmp_path) == [
        ("real/b.png", 1, "real"),
        ("real/camera/a.jpg", 1, "real"),
        ("fake/loose.png", 0, "fake"),
        ("fake/gan/x.webp", 0, "gan"),
        ("fake/sd/2.png", 0, "sd"),
        ("fake/sd/deep/1.PNG", 0, "sd"),
    ]
    assert {(r.question, r.answer) for r in records} == {("", "")}
    assert read_labelled(str(tmp_path)) == records


def test_one_label_is_enough(tmp_path):
    make(tmp_path, "a/real/1.png", "b/fake/gan/1.png")
    assert rows(read_labelled(tmp_path / "a"), tmp_path / "a") == [("real/1.png", 1, "real")]
    assert rows(read_labelled(tmp_path / "b"), tmp_path / "b") == [("fake/gan/1.png", 0, "gan")]


def test_annotation_file(tmp_path):
    turns = [{"from": "human", "value": "<image>Real?"}, {"from": "gpt", "value": "This is a fake image."}]
    entry = {"image": "x/1.png", "label": 0, "cate": "satellite", "conversations": turns}
    (tmp_path / "a.json").write_text(json.dumps([entry]))
    (record,) = read_labelled(tmp_path / "a.json")
    assert (record.image, record.label, record.category) == (tmp_path / "x/1.png", 0, "satellite")
    assert (record.question, record.answer) == ("Real?", "This is a fake image.")
    (record,) = read_labelled(tmp_path / "a.json", image_root=tmp_path / "images")
    assert record.image == tmp_path / "images/x/1.png"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["notes.txt"], r"holds no sub-folders; it must hold images in real/, fake/ or both"),
        (["real/1.png", "Fake/1.png", "sd/1.png"], r"holds Fake/, sd/; it must hold"),
        (["real/1.png", "loose.png"], r"holds loose\.png; it must hold"),
        (
            ["real/notes.txt", "fake/1.png"],
            r"/real holds no images; put there real images, or remove it: fake/ is enough",
        ),
        (
            ["real/1.png", "fake/notes.txt"],
            r"/fake holds no images; put there fake images, or remove it: real/ is enough",
        ),
        (["real/1.png", "fake/1.png", "fake/sd/notes.txt"], r"/fake/sd holds no images; put there this generator's im"),
        (["real/1.png", "fake/real/1.png"], r"folder .*fake.real would be a generator of the name 'real'; rename it"),
    ],
)
def test_folder_errors(tmp_path, names, message):
    with pytest.raises(ValueError, match=message):
        read_labelled(make(tmp_path, *names))


def test_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"lost does not exist; it must be an annotation file or a folder"):
        read_labelled(tmp_path / "lost")
    with pytest.raises(ValueError, match=r"^image_root is 'x'; leave it out: .* is a folder, which holds its images"):
        read_labelled(make(tmp_path, "real/1.png"), image_root="x")
    with pytest.raises(ValueError, match=r"^--image-root is 'x'; leave it out"):
        read_labelled(tmp_path, image_root="x", root_option="--image-root")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"a\.json is not JSON"):
        read_labelled(tmp_path / "a.json")


def test_listing_order_and_what_counts(tmp_path):
    make(tmp_path, "b/2.JPEG", "b/1.tif", "a.heic", "z.gif", ".x.png", ".git/1.png", "b/notes.txt", "c d/é\n.png")
    names = [str(path.relative_to(tmp_path)) for path in list_images(tmp_path)]
    assert names == ["a.heic", "z.gif", "b/1.tif", "b/2.JPEG", "c d/é\n.png"]
    with pytest.raises(FileNotFoundError, match="lost does not exist"):
        list_images(tmp_path / "lost")
    with pytest.raises(NotADirectoryError, match=r"z\.gif is not a folder"):
        list_images(tmp_path / "z.gif")


def test_links_are_followed_but_never_in_circles(tmp_path):
    make(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "self").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "other").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "back").symlink_to(tmp_path / "a")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    names = [str(path.relative_to(tmp_path)) for path in list_images(tmp_path)]
    assert names == ["gone.png", "loop.png", "a/1.png", "a/other/2.png", "b/2.png", "b/back/1.png"]


def test_a_folder_that_may_not_be_listed_stands_for_its_images(tmp_path, monkeypatch):
    make(tmp_path, "a/1.png", "b/2.png")
    listdir = os.listdir

    def refusing(folder):
        if str(folder).endswith("a"):
            raise PermissionError(13, "Permission denied", str(folder))
        return listdir(folder)

    monkeypatch.setattr(image_files.os, "listdir", refusing)
    assert list_images(tmp_path) == [tmp_path / "a", tmp_path / "b" / "2.png"]
