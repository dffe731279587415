"""docs/study.md and the README say what is recorded of the study, and nothing else."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
from study_demo import demo_study

from unigendet.evaluation.comparisons import Comparison, summarise
from unigendet.study.config import Arm, StudyConfig

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def recorder(tmp_path, monkeypatch):
    """The program that records a study, with its files in ``tmp_path``."""
    monkeypatch.syspath_prepend(str(ROOT))
    module = importlib.import_module("benchmarks.study")
    for name in ("README", "DOCUMENT"):
        copy = tmp_path / getattr(module, name).name
        shutil.copy(getattr(module, name), copy)
        monkeypatch.setattr(module, name, copy)
    if module.RECORD.is_file():
        shutil.copy(module.RECORD, tmp_path / "record.json")
    monkeypatch.setattr(module, "RECORD", tmp_path / "record.json")
    return module


def test_documents_say_what_is_recorded(recorder, capsys):
    assert recorder.main(["--check"]) == 0, "run python -m benchmarks.study"
    honest = recorder.DOCUMENT.read_text(encoding="utf-8")
    end = f"<!-- {recorder.MARK}:end -->"
    recorder.DOCUMENT.write_text(honest.replace(end, "And a word more.\n" + end), encoding="utf-8")
    assert recorder.main(["--check"]) == 1
    assert "study.md does not say what is recorded; run python -m benchmarks.study" in capsys.readouterr().err
    assert recorder.main([]) == 0
    assert recorder.DOCUMENT.read_text(encoding="utf-8") == honest


def test_the_record_s_means_follow_from_its_runs(recorder):
    """Nobody wrote a mean or an interval by hand."""
    study = recorder.read_study(recorder.RECORD) if recorder.RECORD.is_file() else demo_study()
    runs = {(run["seed"], run["arm"]): run["metrics"] for run in study["runs"]}
    primary = [Comparison(c["arm"], c["control"], c["metric"]) for c in study["comparisons"] if c["primary"]]
    arms = [(arm["name"], arm["controls"]) for arm in study["arms"]]
    again = json.loads(json.dumps(summarise(arms, primary, runs)))
    for name in ("estimates", "comparisons"):
        assert approximately(again[name]) == approximately(study[name])


def approximately(value):
    """Numbers to nine digits: sums may be made in another order elsewhere."""
    if isinstance(value, dict):
        return {key: approximately(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [approximately(entry) for entry in value]
    return f"{value:.9g}" if isinstance(value, float) else value


@pytest.fixture
def planned(recorder, monkeypatch):
    """Settings that plan the made-up study, but for one override."""
    arms = {"one": Arm("arm <one>", controls=("two",)), "two": Arm("arm two"), "three": Arm("arm three", after="one")}
    settings = StudyConfig(arms, primary=(Comparison("one", "two", "frechet"),), seeds=4, draws=3)
    monkeypatch.setattr(recorder, "current", lambda: settings)


def whole_study():
    """The made-up study as if every arm had run with every seed."""
    study = demo_study()
    for arm in study["arms"]:
        arm["seeds"] = [1, 2, 3, 4]
    study["environments"] = [study["environments"][0] | {"commit": "0123456789abcdef+changes"}]
    return study


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["arms"][1].update(seeds=[1, 2, 3]), r"'two': \[1, 2, 3\].*they must be \[1, 2, 3, 4\]"),
        (lambda s: s["arms"][1].update(seeds=[1, 2, 3, 4, 5]), "they must be"),
        (lambda s: s["arms"].pop(), "'three': None"),
        (lambda s: s["arms"].append({"name": "four", "seeds": [1]}), r"'four': \[1\]"),
        (lambda s: s["comparisons"][0].update(primary=not s["comparisons"][0]["primary"]), "primary comparisons are"),
        (lambda s: s["environments"].append(s["environments"][0]), "come from 2 environments"),
    ],
)
def test_only_the_planned_study_is_recorded(recorder, planned, tmp_path, change, message):
    study = whole_study()
    change(study)
    (tmp_path / "study.json").write_text(json.dumps(study), encoding="utf-8")
    before = recorder.RECORD.read_bytes() if recorder.RECORD.is_file() else None
    with pytest.raises(ValueError, match=message):
        recorder.main([str(tmp_path)])
    assert (recorder.RECORD.read_bytes() if recorder.RECORD.is_file() else None) == before


def test_recording(recorder, planned, tmp_path):
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "study.json").write_text(json.dumps(whole_study()), encoding="utf-8")
    assert recorder.main([str(folder)]) == 0
    assert recorder.main(["--check"]) == 0
    document, readme = (f.read_text(encoding="utf-8") for f in (recorder.DOCUMENT, recorder.README))
    row = "| arm <one> against arm two | Fréchet distance |"
    for text in (document, readme):
        assert row in text
        assert "8 runs: 3 arms, 4 seeds, 3 draws of the test prompts each; 9 min 12 s, 18 min 24 s of processor" in text
        assert "commit 0123456789ab+changes)" in text
        assert "Of 5 exploratory differences, " in text
        assert "**Not what `unigendet study` does now.**" in text
    assert "| arm two | `gduf.total_steps=3` | new weights |" in document
    assert "| arm three |  | arm <one> |" in document
    assert "| arm two | 4 |" in document
    assert "| arm two | 4 |" not in readme
    assert "### All arms" in document
    before = recorder.RECORD.read_bytes()
    (folder / "study.json").write_text(json.dumps({"schema": 0}), encoding="utf-8")
    with pytest.raises(ValueError, match="has schema 0; it must be 1"):
        recorder.main([str(folder)])
    assert recorder.RECORD.read_bytes() == before


def test_nothing_recorded(recorder):
    recorder.RECORD.unlink(missing_ok=True)
    assert recorder.main([]) == 0
    for file in (recorder.DOCUMENT, recorder.README):
        assert recorder.NOTHING in file.read_text(encoding="utf-8")
