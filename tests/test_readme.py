"""README and documents tell the truth: code runs, commands exist, links resolve, numbers are the recorded ones."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unigendet.cli import build_parser
from unigendet.evaluation.figures import save_image_grid
from unigendet.training.config import load_train_config

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "csrc" / "README.md",
    ROOT / "tests" / "data" / "golden" / "README.md",
]
FOLDERS = "unigendet|kernels|csrc|benchmarks|configs|docs|tests"
EXTRAS = ("triton", "transformers", "diffusers", "tokenizers", "safetensors", "PIL", "sklearn", "rich", "jsonargparse")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    lines = "\n".join(blocks("bash")).splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("code", blocks("python"))
def test_code_runs_with_the_core_dependencies_alone(code, tmp_path):
    blocked = f"import sys\nsys.modules.update(dict.fromkeys({EXTRAS!r}))\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-c", blocked + code]
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nan" not in done.stdout


def test_there_is_code():
    assert len(blocks("python")) == 1
    assert len(commands()) >= 10


def test_commands_exist():
    parser = build_parser()
    (choices,) = [a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    shown = [words[1:] for words in commands() if words[0] == "unigendet"]
    for words in shown:
        options, rest = parser.parse_known_args(words)
        if options.command == "train":
            load_train_config(ROOT / options.config, rest)
        else:
            assert not rest, words
    assert {words[0] for words in shown} == set(choices)
    assert set(re.findall(r"`unigendet ([a-z]+)", README)) <= set(choices)


def test_targets_and_extras_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    text = "\n".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    named = {words[1] for words in commands() if words[0] == "make"} | set(re.findall(r"`make ([a-z]+)`", text))
    assert {"quickstart", "test"} <= named <= targets
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    installed = [words[-1] for words in commands() if words[:2] == ["pip", "install"]]
    assert {name for word in installed for name in re.findall(r"[a-z]+", word)} == set(extras)


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub gives a document's headings."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = document.parent / file if file else document
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target
    for name in re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", text):
        assert (ROOT / name).exists(), name


def test_named_tests_exist():
    named = set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs" / "model.md").read_text(encoding="utf-8")))
    assert len(named) > 20
    for file, name in named:
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"


def test_sections_that_docstrings_name_exist():
    model = (ROOT / "docs" / "model.md").read_text(encoding="utf-8")
    sections = set(re.findall(r"^(?:## (?=\d+\.)|\| (?=12\.))([\d.]*\d)\b", model, re.MULTILINE))
    assert sections >= {*map(str, range(1, 13)), *(f"12.{i}" for i in range(1, 11))}
    files = [file for folder in ("unigendet", "tests") for file in (ROOT / folder).rglob("*.py")]
    named = {(file, n) for file in files for n in re.findall(r"model\.md §(\d+(?:\.\d+)?)", file.read_text("utf-8"))}
    assert len(named) > 5
    assert not {(file, n) for file, n in named if n not in sections}


@pytest.fixture
def recorder(tmp_path, monkeypatch):
    """The program that records a quickstart, with its files in ``tmp_path``."""
    monkeypatch.syspath_prepend(str(ROOT))
    module = importlib.import_module("benchmarks.quickstart")
    for name in ("README", "RECORD", "PICTURE"):
        copy = tmp_path / getattr(module, name).name
        shutil.copy(getattr(module, name), copy)
        monkeypatch.setattr(module, name, copy)
    return module


def test_the_numbers_are_the_recorded_ones(recorder, capsys):
    assert recorder.main(["--check"]) == 0, "run python -m benchmarks.quickstart"
    honest = recorder.README.read_text(encoding="utf-8")
    begin = honest.index("%", honest.index(recorder.BEGIN)) - 2
    recorder.README.write_text(honest[:begin] + "9" + honest[begin + 1 :] + "\n", encoding="utf-8")
    assert recorder.main(["--check"]) == 1
    assert "python -m benchmarks.quickstart" in capsys.readouterr().err
    assert recorder.main([]) == 0
    assert recorder.README.read_text(encoding="utf-8") == honest + "\n"


def test_a_record_of_other_settings_says_so(recorder):
    report, current = recorder.read_report(recorder.RECORD), recorder.current_settings()
    report["settings"]["quickstart"] = json.loads(json.dumps(current))
    assert "Not what" not in recorder.section(report, current)
    report["settings"]["quickstart"]["gduf"]["optimizer"]["lr"] = 0.5
    assert "`gduf.optimizer.lr` 0.5 → " in recorder.section(report, current)
    del report["settings"]["quickstart"]["gduf"]["optimizer"]["lr"]  # a setting that is newer than the record
    assert "Not what" not in recorder.section(report, current)


@pytest.mark.parametrize(
    ("recorded", "current", "told"),
    [
        ({"recompute": False}, {"recompute": "none"}, []),
        ({"num_workers": 0}, {"num_workers": 1}, []),
        ({"num_workers": 0}, {"num_workers": 0}, []),
        ({"num_workers": 0}, {"num_workers": 2}, ["`num_workers` 0 → 2"]),
    ],
)
def test_other_words_for_a_setting_are_no_change(recorder, recorded, current, told):
    assert list(recorder.changes(recorded, current)) == told


def test_recording(recorder, tmp_path):
    report = recorder.read_report(recorder.RECORD)
    folder = tmp_path / "quickstart"
    images = np.random.default_rng(0).integers(17, size=(80, 8, 8))
    for i in range(len(report["grids"])):
        save_image_grid(images, folder / "grids" / f"{i:02d}.png", columns=8)
    (folder / "report.json").write_text(json.dumps({**report, "seed": 77, "curves": {"GDUF": []}}), encoding="utf-8")
    assert recorder.main([str(folder)]) == 0
    assert "seed 77" in recorder.README.read_text(encoding="utf-8")
    assert "curves" not in recorder.read_report(recorder.RECORD)
    assert recorder.PICTURE.stat().st_size < 300_000
    with Image.open(recorder.PICTURE) as picture:
        assert picture.width > picture.height > 568
    (folder / "grids" / "00.png").unlink()
    with pytest.raises(ValueError, match="holds 2 pictures; the report names 3"):
        recorder.record(folder)
    (folder / "report.json").write_text(json.dumps({"schema": 0}), encoding="utf-8")
    with pytest.raises(ValueError, match="has schema 0"):
        recorder.record(folder)
