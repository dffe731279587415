"""docs/training.md says what the plans of the recipes give, and nothing else."""

import importlib
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from unigendet.cli import build_parser
from unigendet.evaluation.inception import WEIGHTS
from unigendet.training.config import load_train_config
from unigendet.training.preflight import model_settings

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


def test_shared_memory_for_the_packs():
    """Of both recipes, from their settings: what the page tells people to give a container."""
    text, sizes = " ".join(DOCUMENT.read_text(encoding="utf-8").split()), []
    for stage in ("gduf", "diga"):
        config = load_train_config(ROOT / "configs" / f"{stage}_bagel7b.yaml", [])
        latent, loader = model_settings(config).latent, config.loader
        token = latent.stride**2 * 3 * torch.float32.itemsize
        views = 1 if stage == "gduf" else 2  # a ViT's patch has fewer pixels; the teacher's view about as many in all
        packs = loader.num_workers * loader.prefetch + 1
        pack = views * token * loader.max_tokens / 2**20
        sizes.append((token / 2**10, latent.stride, round(pack), packs, round(8 * packs * pack / 2**10, 1)))
    (token, side, one, packs, node), (*same, other, _, other_node) = sizes
    assert same == [token, side]
    assert f"{token:.0f} KiB for a token of {side} × {side}: at most {one} MiB a pack in GDUF" in text
    assert f"about {other} MiB in DIGA" in text
    assert f"`prefetch` + 1 = {packs} of them there: {node} GiB a node of 8 in GDUF, {other_node} GiB in DIGA" in text
    assert other_node < int(re.search(r"--shm-size=(\d+)g", text)[1])


def test_the_inception_weights_are_named():
    assert WEIGHTS in DOCUMENT.read_text(encoding="utf-8")


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
