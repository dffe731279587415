"""Whose folder it is: a job takes a new one or one that its kind left, and leaves all others as they are."""

import pytest

from unigendet.files import claim_folder

MARK, PARTS = ".ours", ("model", "report.html")


def claim(out):
    claim_folder(out, MARK, PARTS, by="a job", note="A job made this folder.")


def names(out):
    return sorted(path.name for path in out.iterdir())


def test_a_new_folder_gets_its_mark(tmp_path):
    out = tmp_path / "a" / "b"
    claim(out)
    assert names(out) == [MARK]
    assert (out / MARK).read_text() == "A job made this folder.\n"


@pytest.mark.parametrize(
    "left", [".model.old", ".model.partial", ".model.gone", ".report.html.partial", "..ours.partial"]
)
def test_what_a_killed_process_left_is_no_stranger(tmp_path, left):
    claim(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / left).write_text("half")
    claim(tmp_path)
    assert names(tmp_path) == sorted({MARK, "model", left} - {"..ours.partial"})  # the mark is written anew, whole


@pytest.mark.parametrize("marked", [True, False])
def test_a_stranger_s_folder_is_left_alone(tmp_path, marked):
    if marked:
        claim(tmp_path)
    for name in ("thesis.txt", ".thesis.partial"):
        (tmp_path / name).write_text("mine")
    before = names(tmp_path)
    with pytest.raises(
        ValueError, match=r"which holds \.thesis\.partial, thesis\.txt; it must be a new folder, or one that a job"
    ):
        claim(tmp_path)
    assert names(tmp_path) == before


@pytest.mark.parametrize("name", ["model", ".model.partial"])
def test_our_names_without_the_mark_are_somebody_else_s(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=f"which holds {name}; it must be"):
        claim(tmp_path)
    assert names(tmp_path) == [name]


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="out', which is a file; it must be a new folder"):
        claim(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"
