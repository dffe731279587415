"""A labelled contact sheet: pictures in a grid, a row for each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from unigendet.config import check
from unigendet.data.transforms import read_image
from unigendet.files import whole_file

MARK = ("Software", "unigendet contact sheet")  # PNG metadata, by which a sheet is known
MAX_ROWS, MAX_COLUMNS = 64, 16  # what one can look at; the sheet says what is left out
MARGIN, GAP, LABEL, LINE, FONT_SIZE = 16, 8, 200, 17, 13  # pixels
INK, FAINT, PAPER = (32, 33, 36), (110, 112, 117), (255, 255, 255)


@dataclass(frozen=True)
class SheetRow:
    """Pictures (their files) to the right of a label, each with a caption such as its seed."""

    label: str
    pictures: tuple[Path, ...]
    captions: tuple[str, ...]


def contact_sheet(rows: Sequence[SheetRow], *, size: int = 160) -> Image.Image:
    """Draw a sheet; every picture fits into ``size`` × ``size`` pixels.

    Small pictures are enlarged by a whole factor, with their pixels visible; large ones are reduced. Captions that all
    rows share stand once, above the columns, others under each picture. At most ``MAX_ROWS`` rows and ``MAX_COLUMNS``
    columns are shown, the first ones.
    Raises ValueError without rows or for a row without pictures.
    """
    check(bool(rows), "rows", list(rows), "at least one")
    for row in rows:
        check(
            0 < len(row.pictures) == len(row.captions), "captions", row.captions, "one for each picture, at least one"
        )
    shown = [SheetRow(r.label, r.pictures[:MAX_COLUMNS], r.captions[:MAX_COLUMNS]) for r in rows[:MAX_ROWS]]
    left_out = sum(len(r.pictures) for r in rows) - sum(len(r.pictures) for r in shown)
    longest = max(shown, key=lambda row: len(row.captions)).captions
    shared = all(row.captions == longest[: len(row.captions)] for row in shown)
    columns = len(longest)
    step = size + GAP + (0 if shared else LINE)
    head = LINE if shared else 0
    foot = LINE + GAP if left_out else 0
    width = 2 * MARGIN + LABEL + columns * (size + GAP)
    sheet = Image.new("RGB", (width, 2 * MARGIN + head + len(shown) * step - GAP + foot), PAPER)
    pen = _Pen(ImageDraw.Draw(sheet))
    if shared:
        for j, caption in enumerate(longest):
            pen.line((MARGIN + LABEL + j * (size + GAP), MARGIN - 4), caption, size, FAINT)
    for i, row in enumerate(shown):
        top = MARGIN + head + i * step
        pen.paragraph((MARGIN, top), row.label, LABEL - MARGIN, size)
        for j, (path, caption) in enumerate(zip(row.pictures, row.captions, strict=True)):
            left = MARGIN + LABEL + j * (size + GAP)
            sheet.paste(_fitted(path, size), (left, top))
            if not shared:
                pen.line((left, top + size + 1), caption, size, FAINT)
    if left_out:
        pen.line((MARGIN, sheet.height - MARGIN - LINE + 4), f"and {left_out:,} pictures more", width, FAINT)
    return sheet


def save_contact_sheet(path: Path, rows: Sequence[SheetRow], *, size: int = 160) -> None:
    """Draw a sheet into a PNG file. Errors as ``contact_sheet``'s, and OSError for a file that cannot be written."""
    info = PngInfo()
    info.add_text(*MARK)
    sheet = contact_sheet(rows, size=size)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        sheet.save(partial, format="PNG", pnginfo=info)


def is_contact_sheet(path: Path) -> bool:
    """Whether a file is a contact sheet that was made here."""
    try:
        return read_image(path).info.get(MARK[0]) == MARK[1]
    except (ValueError, OSError):
        return False


def _fitted(path: Path, size: int) -> Image.Image:
    picture = read_image(path)
    factor = size // max(picture.size)
    if factor >= 2:
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    if max(picture.size) > size:
        picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    return picture


class _Pen:
    """Writes text that stays within a width."""

    def __init__(self, draw: ImageDraw.ImageDraw) -> None:
        self._draw = draw
        self._font = ImageFont.truetype(
            Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", FONT_SIZE
        )

    def _cut(self, text: str, width: int) -> str:
        if self._font.getlength(text) <= width:
            return text
        while text and self._font.getlength(text + "…") > width:
            text = text[:-1]
        return text + "…"

    def line(self, at: tuple[int, int], text: str, width: int, colour: tuple[int, int, int]) -> None:
        self._draw.text(at, self._cut(text, width), font=self._font, fill=colour)

    def paragraph(self, at: tuple[int, int], text: str, width: int, height: int) -> None:
        """Words one after another, in as many lines as fit into ``height``."""
        lines = [""]
        for word in text.split():
            longer = f"{lines[-1]} {word}".strip()
            if lines[-1] and self._font.getlength(longer) > width:
                lines.append(word)
            else:
                lines[-1] = longer
        most = max(1, height // LINE)
        if len(lines) > most:
            lines[most - 1 :] = [" ".join(lines[most - 1 :])]
        for i, one in enumerate(lines):
            self.line((at[0], at[1] + i * LINE), one, width, INK)
