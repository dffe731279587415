"""Rows of results, written as they come: a table for people, JSON Lines and CSV for programs.

- ``table`` on a terminal: columns under a heading, long texts wrapped. Elsewhere: one line per row, cells separated by
  tabs, no heading; characters that would break the line or act on a terminal are written as escapes (``\\n``).
- ``jsonl``: one JSON object per line; ``csv``: a heading, then RFC 4180's quoting with line feeds. Both hold every
  character of a name. Bytes of a name that are not UTF-8 appear as ``\\udcXX``, in JSON its own escape.
"""

from __future__ import annotations

import contextlib
import csv
import json
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

from unigendet.commands.common import UserError

Format = Literal["table", "jsonl", "csv"]
FORMATS: tuple[Format, ...] = ("table", "jsonl", "csv")


def format_of(name: Format | None, out: Path | None) -> Format:
    """The format asked for; by default the one that the suffix of ``out`` names, else a table."""
    if name is not None:
        return name
    by_suffix: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv"}
    return "table" if out is None else by_suffix.get(out.suffix.lower(), "table")


def check_out(out: Path | None, overwrite: bool | None = None) -> None:
    """Make the folder of ``out`` and raise UserError if the file cannot be written: before the work, not after it.

    A file that holds something is replaced only with ``overwrite``; None: the command has no such option.
    """
    if out is None:
        return
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; name a file")
    if out.is_file() and out.stat().st_size and not overwrite:
        ways = "remove it or choose another name" if overwrite is None else "choose another name, or give --overwrite"
        raise UserError(f"--out {out} holds something already; {ways}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if overwrite or not out.exists():  # a file is made beside it
            tempfile.TemporaryFile(dir=out.parent).close()
        elif out.is_file():  # a pipe's reader would take this for the end
            out.open("ab").close()
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from error


class RowWriter:
    """A context manager that writes rows to ``out``, or standard output, each as soon as it is there.

    Args:
        columns: of every row, in their order; the last two are texts, such as an explanation and an error.
        heads: the other columns' headings and widths in a terminal's table; the texts share the rest of the line.
        form: one of ``FORMATS``.
        out: a file to be written, see ``check_out``.
    """

    def __init__(self, columns: Sequence[str], heads: Mapping[str, int], form: Format, out: Path | None = None) -> None:
        self._columns, self._heads, self._form, self._out = list(columns), dict(heads), form, out
        self._stack = contextlib.ExitStack()
        self._begun = False

    def __enter__(self) -> RowWriter:
        if self._out is None:
            self._file: TextIO = sys.stdout
        else:
            self._out.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._stack.enter_context(
                open(self._out, "w", encoding="utf-8", errors="backslashreplace", newline="")
            )
        terminal = self._file.isatty()
        ways: dict[str, Callable[[Mapping[str, Any]], None]] = {
            "jsonl": self._write_json,
            "csv": self._write_csv,
            "table": self._write_columns if terminal else self._write_tabs,
        }
        self._write = ways[self._form]
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def write(self, row: Mapping[str, Any]) -> None:
        """Write one row. Raises UserError if the file cannot take it."""
        try:
            self._write(row)
            self._file.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            where = self._out or "standard output"
            raise UserError(f"{where} cannot be written: {error.strerror}; the rows before are there") from error

    def _write_json(self, row: Mapping[str, Any]) -> None:
        plain = (self._file.encoding or "").lower().replace("-", "") != "utf8"
        self._file.write(json.dumps({name: row[name] for name in self._columns}, ensure_ascii=plain) + "\n")

    def _write_csv(self, row: Mapping[str, Any]) -> None:
        cells = ["" if row[name] is None else row[name] for name in self._columns]
        # Quotes where they are needed; Python before 3.13 does not see that a carriage return needs them.
        every = any("\r" in one for one in cells if isinstance(one, str))
        writer = csv.writer(self._file, lineterminator="\n", quoting=csv.QUOTE_ALL if every else csv.QUOTE_MINIMAL)
        if not self._begun:
            writer.writerow(self._columns)
            self._begun = True
        writer.writerow(cells)

    def _write_tabs(self, row: Mapping[str, Any]) -> None:
        self._file.write("\t".join(self._cells(row)) + "\n")

    def _write_columns(self, row: Mapping[str, Any]) -> None:
        """The last two columns share one place: whichever has something to say."""
        if not self._begun:
            self._file.write(self._line([*self._heads, " or ".join(self._columns[-2:])]))
            self._begun = True
        *cells, text, other = self._cells(row)
        self._file.write(self._line([*cells, text or other]))

    def _line(self, cells: list[str]) -> str:
        """Cells in their columns; after one that is too wide, the others go on in a new line."""
        lines, place = [""], 0
        for text, width in zip(cells[:-1], self._heads.values(), strict=True):
            lines[-1] = lines[-1].ljust(place) + text
            place += width + 2
            if len(lines[-1]) > place - 2:
                lines.append("")
        room = max(20, shutil.get_terminal_size().columns - place - 1)
        first, *more = textwrap.wrap(cells[-1], room, break_on_hyphens=False) or [""]
        lines[-1] = lines[-1].ljust(place) + first
        lines += [" " * place + text for text in more]
        return "".join(line.rstrip() + "\n" for line in lines)

    def _cells(self, row: Mapping[str, Any]) -> list[str]:
        """The two texts at the end lose their line breaks; a name keeps them, as escapes."""
        *cells, text, other = (row[name] for name in self._columns)
        return [*map(cell, cells), *(cell(" ".join((t or "").split())) for t in (text, other))]


def cell(value: Any) -> str:
    """A value on one line of plain characters: None is empty, numbers have four decimals."""
    if value is None:
        return ""
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
