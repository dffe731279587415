"""Contact sheets: every picture where it belongs, labels that stay in their place."""

import numpy as np
import pytest
from PIL import Image

from unigendet.evaluation import contact_sheet as module
from unigendet.evaluation.contact_sheet import (
    GAP,
    LABEL,
    LINE,
    MARGIN,
    PAPER,
    SheetRow,
    contact_sheet,
    is_contact_sheet,
    save_contact_sheet,
)


@pytest.fixture
def files(tmp_path):
    """Pictures of one colour each, by a function of colour and size."""

    def make(colour, size=(8, 8)):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.png"
        Image.new("RGB", size, colour).save(path)
        return path

    return make


def cell(sheet, row, column, size, top, step):
    left, top = MARGIN + LABEL + column * (size + GAP), MARGIN + top + row * step
    return np.asarray(sheet.crop((left, top, left + size, top + size)))


def test_captions_that_all_rows_share_stand_once_above(files):
    colours = [[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (9, 9, 9)]]
    rows = [SheetRow("p", tuple(map(files, row)), ("seed 1", "seed 2")) for row in colours]
    sheet = contact_sheet(rows, size=40)
    assert sheet.size == (2 * MARGIN + LABEL + 2 * (40 + GAP), 2 * MARGIN + LINE + 2 * (40 + GAP) - GAP)
    for i in range(2):
        for j in range(2):
            assert (cell(sheet, i, j, 40, LINE, 40 + GAP) == colours[i][j]).all()


def test_other_captions_stand_under_their_pictures(files):
    rows = [SheetRow("p", (files((255, 0, 0)),), ("seed 1",)), SheetRow("q", (files((0, 0, 255)),), ("seed 2",))]
    step = 40 + GAP + LINE
    sheet = contact_sheet(rows, size=40)
    assert sheet.height == 2 * MARGIN + 2 * step - GAP
    assert (cell(sheet, 1, 0, 40, 0, step) == (0, 0, 255)).all()
    under = np.asarray(sheet.crop((MARGIN + LABEL, MARGIN + 40, MARGIN + LABEL + 40, MARGIN + 40 + LINE)))
    assert (under != PAPER).any()


def test_small_pictures_keep_their_pixels_and_large_ones_their_shape(files, tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (3, 6), dtype=np.uint8)).save(tmp_path / "small.png")
    row = SheetRow("p", (tmp_path / "small.png", files((1, 2, 3), (400, 100))), ("a", "b"))
    sheet = contact_sheet([row], size=40)
    small = cell(sheet, 0, 0, 40, LINE, 0)
    assert np.array_equal(small[:18:6, :36:6, 0], np.asarray(Image.open(tmp_path / "small.png")))
    assert (small[18:] == PAPER).all()
    large = cell(sheet, 0, 1, 40, LINE, 0)
    assert (large[:10] == (1, 2, 3)).all()
    assert (large[10:] == PAPER).all()


def test_long_labels_stay_beside_their_row(files):
    label = "word " * 500 + "x" * 500
    sheet = contact_sheet([SheetRow(label, (files((0, 0, 0)),), ("c" * 500,))] * 2, size=40)
    pixels = np.asarray(sheet)
    assert (pixels[:, MARGIN + LABEL - MARGIN : MARGIN + LABEL] == PAPER).all()
    assert (pixels[MARGIN + LINE + 40 + 4 : MARGIN + LINE + 40 + GAP, :LABEL] == PAPER).all()
    assert (pixels[:, -MARGIN:] == PAPER).all()


def test_a_large_sheet_says_what_it_leaves_out(files, monkeypatch):
    monkeypatch.setattr(module, "MAX_ROWS", 2)
    monkeypatch.setattr(module, "MAX_COLUMNS", 3)
    said = []
    monkeypatch.setattr(module._Pen, "line", lambda self, at, text, width, colour: said.append(text))
    picture = files((0, 0, 0))
    rows = [SheetRow("p", (picture,) * 4, tuple("abcd"))] * 3
    assert contact_sheet(rows, size=40).width == 2 * MARGIN + LABEL + 3 * (40 + GAP)
    assert said == ["a", "b", "c", "p", "p", "and 6 pictures more"]


def test_files(files, tmp_path):
    rows = [SheetRow("p", (files((0, 0, 0)),), ("a",))]
    for name in ("x/1.png", "x/2.png"):
        save_contact_sheet(tmp_path / name, rows)
    assert (tmp_path / "x/1.png").read_bytes() == (tmp_path / "x/2.png").read_bytes()
    assert is_contact_sheet(tmp_path / "x/1.png")
    (tmp_path / "text").write_text("no picture")
    assert not any(map(is_contact_sheet, (rows[0].pictures[0], tmp_path / "text", tmp_path / "lost")))
    for bad in ([], [SheetRow("p", (), ())], [SheetRow("p", rows[0].pictures, ())]):
        with pytest.raises(ValueError, match=r"rows|captions"):
            contact_sheet(bad)
