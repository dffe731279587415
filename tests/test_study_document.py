"""docs/study.md and the README say what is recorded of the study, and nothing else."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
from study_demo import demo_study

from unigendet.evaluation.comparisons import Comparison, summarise

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


def test_recording(recorder, tmp_path):
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "study.json").write_text(json.dumps(demo_study()), encoding="utf-8")
    assert recorder.main([str(folder)]) == 0
    assert recorder.main(["--check"]) == 0
    document, readme = (f.read_text(encoding="utf-8") for f in (recorder.DOCUMENT, recorder.README))
    row = "| arm <one> against arm two | Fréchet distance |"
    for text in (document, readme):
        assert row in text
        assert "8 runs: 3 arms, 4 seeds, 3 draws of the test prompts each; 9 min 12 s, 18 min 24 s of processor" in text
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
