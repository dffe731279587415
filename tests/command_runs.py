"""Running commands in this process on a small model with random weights."""

import csv
import io
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from run_data import ANSWERS
from tiny_models import tiny_model

from unigendet.cli import main
from unigendet.config import DataConfig, ImageConfig
from unigendet.data.tokenizer import train_tokenizer
from unigendet.inference.pipeline import Pipeline
from unigendet.model.autoencoder import PixelAutoencoder


class Result:
    """A command's exit code, its lines on standard output, and standard error."""

    def __init__(self, code, captured):
        self.code, self.out, self.err = code, captured.out, captured.err
        self.lines = self.out.splitlines()


def run_command(capsys, *arguments):
    """Run ``unigendet`` with arguments; no traceback may show."""
    capsys.readouterr()
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as end:
        code = end.code
    result = Result(code, capsys.readouterr())
    assert "Traceback" not in result.err
    return result


def fails(result, message, code=1):
    """The command failed with one line that says ``message``."""
    assert result.code == code
    assert message in result.err
    assert len(result.err.splitlines()) == 1, result.err


VIEW = ImageConfig(min_size=8, max_size=8, stride=2)


def tiny_pipeline(seed=0, view=VIEW, **changes):
    """A model of 8×8 grey pictures, with byte tokens and 128 positions."""
    model = tiny_model(seed, vocab_size=280, **changes)
    tokenizer = train_tokenizer(ANSWERS, 270)
    return Pipeline(model, tokenizer, PixelAutoencoder(model.config.latent), DataConfig(view, view))


def save_model(folder, seed=0, **changes):
    """The folder of a ``tiny_pipeline`` that sees pictures from 4 pixels on."""
    tiny_pipeline(seed, ImageConfig(min_size=4, max_size=8, stride=2), **changes).save(folder)
    return Path(folder)


def noise_picture(seed, width=9, height=12):
    """A colour picture of noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


COLUMNS = ["path", "verdict", "probability_real", "explanation", "error"]  # of detect's rows


def read_rows(text, form):
    """The rows as dicts of strings, numbers with four decimals; None and "" are the same."""
    if form == "table":
        return [dict(zip(COLUMNS, line.split("\t"), strict=True)) for line in text.splitlines()]
    if form == "csv":
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    else:
        rows = [json.loads(line) for line in text.split("\n")[:-1]]
    assert all(list(row) == COLUMNS for row in rows)
    for row in rows:
        p = row["probability_real"]
        row["probability_real"] = "" if p in (None, "") else f"{float(p):.4f}"
        row["error"] = row["error"] or ""
    return rows


def write_pictures(folder):
    """Three pictures, one of them in a folder below, and a file that is none; returns ``folder``."""
    (folder / "more").mkdir(parents=True)
    for i, name in enumerate(("b.png", "a.JPG", "more/c.webp")):
        noise_picture(i).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


class StandardInput:
    """Stands for ``sys.stdin`` with bytes to read."""

    def __init__(self, monkeypatch, content):
        self.buffer = io.BytesIO(content)
        monkeypatch.setattr(sys, "stdin", self)
