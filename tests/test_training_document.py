"""docs/training.md says what the plans of the recipes give, and nothing else."""

import importlib
import re
import shlex
import shutil
from pathlib import Path

import pytest

from unigendet.cli import build_parser
from unigendet.training.config import load_train_config

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "training.md"


@pytest.fixture
def plans(tmp_path, monkeypatch):
    """The program that writes the tables, on a copy of the document."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    module = importlib.import_module("benchmarks.plans")
    shutil.copy(DOCUMENT, tmp_path / "training.md")
    monkeypatch.setattr(module, "DOCUMENT", tmp_path / "training.md")
    return module


def test_the_tables_are_what_is_computed(plans, capsys):
    honest = plans.DOCUMENT.read_text(encoding="utf-8")
    assert plans.main(["--check"]) == 0, "run python -m benchmarks.plans"
    peak = re.search(r"\*\*peak, GiB\*\* \| \*\*([\d.]+)\*\*", honest)[1]
    plans.DOCUMENT.write_text(honest.replace(f"**{peak}**", "**1.23**"), encoding="utf-8")
    assert plans.main(["--check"]) == 1
    assert "run python -m benchmarks.plans" in capsys.readouterr().err
    assert plans.main([]) == 0
    assert plans.DOCUMENT.read_text(encoding="utf-8") == honest


def commands():
    blocks = re.findall(r"^```bash\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_commands_exist():
    """What the page says to type is understood, settings and all."""
    parser, names = build_parser(), []
    for words in commands():
        if words[0] == "torchrun":
            words = words[words.index("-m") + 1 :]
        if words[0] != "unigendet":
            continue
        options, rest = parser.parse_known_args(words[1:])
        names.append(options.command)
        if options.command == "train":
            load_train_config(ROOT / options.config, [*options.overrides, *rest])
        else:
            assert not rest, words
    assert names.count("train") == 5
    assert {"evaluate", "export", "info"} <= set(names)
