"""Rows, progress and inputs of the commands, each by itself: what a terminal shows, and how often a line appears."""

import io
import os
import re
import sys
from pathlib import Path

import pytest

from unigendet.commands import progress as progress_module
from unigendet.commands.common import UserError
from unigendet.commands.inputs import find_pictures
from unigendet.commands.progress import Progress
from unigendet.commands.rows import RowWriter, cell, check_out, format_of

COLUMNS = ("path", "verdict", "probability_real", "explanation", "error")


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def row(path="a.png", verdict="real", probability=0.75, explanation="", error=None):
    return dict(zip(COLUMNS, (path, verdict, probability, explanation, error), strict=True))


def test_a_table_on_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("COLUMNS", "61")
    with RowWriter(COLUMNS, {"path": 12, "verdict": 9, "p(real)": 7}, "table") as writer:
        writer.write(row(explanation="This is a real image.\nIt has a clean background."))
        writer.write(row("pictures/longer.png", "error", None, error="image pictures/longer.png is empty"))
        writer.write(row("a\x1b[2J.png"))
    assert sys.stdout.getvalue().splitlines() == [
        "path          verdict    p(real)  explanation or error",
        "a.png         real       0.7500   This is a real image. It",
        "                                  has a clean background.",
        "pictures/longer.png",
        "              error               image pictures/longer.png",
        "                                  is empty",
        r"a\x1b[2J.png  real       0.7500",
    ]


def test_rows_that_cannot_be_written(tmp_path, monkeypatch):
    class Full(Terminal):
        def flush(self):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    with (
        RowWriter(COLUMNS, {}, "jsonl") as writer,
        pytest.raises(UserError, match=r"standard output cannot be written: No space left on device; the rows before"),
    ):
        writer.write(row())


def test_an_encoding_that_lacks_characters():
    """JSON then stays within ASCII, and a table shows escapes."""
    for form, text in (("jsonl", rb'"path": "\u6f22.png"'), ("table", rb"\u6f22.png")):
        raw = io.BytesIO()
        stream = io.TextIOWrapper(raw, encoding="latin-1", errors="backslashreplace")  # as the command line sets it
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            with RowWriter(COLUMNS, {}, form) as writer:
                writer.write(row("漢.png"))
        assert text in raw.getvalue()


def test_formats_by_suffix(tmp_path):
    names = {"x.csv": "csv", "x.CSV": "csv", "x.jsonl": "jsonl", "x.ndjson": "jsonl", "x.tsv": "table", "x": "table"}
    assert {name: format_of(None, tmp_path / name) for name in names} == names
    assert format_of(None, None) == "table"
    assert format_of("jsonl", tmp_path / "x.csv") == "jsonl"
    (tmp_path / "x").touch()
    check_out(tmp_path / "x")  # nothing is lost
    check_out(None)


def test_what_cannot_be_written_is_found_before_the_work(tmp_path):
    check_out(tmp_path / "new" / "folder" / "x")
    assert list((tmp_path / "new" / "folder").iterdir()) == []  # the folder is made, and nothing is left in it
    file = tmp_path / "file"
    file.write_text("text")
    for overwrite, message in ((None, "remove it or choose"), (False, "choose another name, or give --overwrite")):
        with pytest.raises(UserError, match=f"file holds something already; {message}"):
            check_out(file, overwrite)
    check_out(file, True)
    assert file.read_text() == "text"
    with pytest.raises(UserError, match="x cannot be written: "):
        check_out(file / "x")
    with pytest.raises(UserError, match="x cannot be written: "):
        check_out(Path("/proc/x"))  # a folder in which not even the administrator makes files
    check_out(Path(os.devnull))


def test_cells():
    assert [cell(value) for value in (None, 0.5, 3, "a\tb\\", "\u202e")] == [
        "",
        "0.5000",
        "3",
        r"a\tb\\"[:-1],
        r"\u202e",
    ]


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_plain_lines_every_so_often(capsys):
    clock = Clock()
    with Progress("unigendet detect", 100, clock=clock) as progress:
        for _ in range(100):
            clock.now += 4
            progress.advance()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 24  # every 16 seconds of 400, but not at the end
    assert lines[0] == "unigendet detect: 4 of 100 images, about 6 min left"
    assert lines[-1] == "unigendet detect: 96 of 100 images, about 16 s left"
    clock = Clock()
    with Progress("x", 10**4, "steps", clock=clock) as progress:
        clock.now = 20
        progress.advance()
    assert capsys.readouterr().err == "x: 1 of 10000 steps, about 55 h 33 min left\n"


def test_a_quick_command_says_nothing(capsys):
    with Progress("x", 3, clock=Clock()) as progress:
        for _ in range(3):
            progress.advance()
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(progress_module, "EVERY", 0)
    with Progress("x", 3) as progress:
        for _ in range(3):
            print("row")
            progress.advance()
    assert sys.stdout.getvalue() == "row\n" * 3  # not a terminal: untouched
    shown = sys.stderr.getvalue()
    assert re.search("3/3", shown)
    assert "left" not in shown


@pytest.mark.parametrize("both", [True, False])
def test_results_and_a_bar_on_a_terminal(monkeypatch, both):
    """Results go to standard output; where that is the same terminal, above the bar. The bar goes by steps."""
    err, out = Terminal(), Terminal() if both else io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(sys, "stdout", out)
    with Progress("x", 3, "pictures") as bar:
        bar.steps(1, 4)
        bar.show("a.png\t[bold]seed[/bold]")
        bar.advance()
    assert "1/3 pictures" in err.getvalue()
    assert "[bold]seed[/bold]" in (err if both else out).getvalue()
    assert out.getvalue() == ("" if both else "a.png\t[bold]seed[/bold]\n")


def test_patterns_and_names_that_look_like_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/1.png", "a/b/2.png", "a/b/notes.txt", "a[1].png", "a/.hidden/3.png", "a/.4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for link in ("circle", "again"):
        (tmp_path / "a" / "b" / link).symlink_to(tmp_path / "a")
    assert find_pictures(["a/**/*.png", "a[1].png", "?/*.png", "lost.png"]) == [
        "a/1.png", "a/b/2.png", "a[1].png", "a/1.png", "lost.png"
    ]  # fmt: skip
    assert find_pictures(["a/**", "**/b/circle/*.png", "a/.*.png", "**/.*/*"]) == [
        "a/1.png", "a/b/2.png", "a/b/notes.txt", "a/b/circle/1.png", "a/.4.png", "a/.hidden/3.png"
    ]  # fmt: skip
    assert find_pictures([f"{tmp_path}/**/[12].png"]) == [f"{tmp_path}/a/1.png", f"{tmp_path}/a/b/2.png"]
    with pytest.raises(UserError, match=r"no file matches the pattern b/\*"):
        find_pictures(["a", "b/*"])
