"""An evaluation's folder: resuming, refusing, and what counts as the same evaluation."""

import dataclasses
import json

import pytest
from detectors import BrightnessDetector, write_images

from unigendet.data.transforms import read_image
from unigendet.evaluation.detection_run import (
    UNDISTURBED,
    VERDICT_TOKENS,
    Predictions,
    RunSettings,
    complete,
    data_hash,
    prepare_folder,
)
from unigendet.evaluation.robustness import Disturbance
from unigendet.evaluation.scoring import judge

IDENTITY = {"model": "m", "data": "d", "settings": {"question": None, "max_tokens": 5}}
DISTURBED = RunSettings(disturbances=(Disturbance("blur", 1), Disturbance("jpeg", 50)))


@pytest.fixture
def root(tmp_path):
    return tmp_path / "data"


@pytest.fixture
def records(root):
    return write_images(root)


@pytest.fixture
def folder(tmp_path):
    return prepare_folder(tmp_path / "out", IDENTITY)


def rows(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def finish(folder, records, root, settings=DISTURBED, detector=None):
    """Completes the folder's predictions; returns them with the detector that was used, if one was."""
    predictions, used = Predictions(folder, records, root), []
    detector = detector or BrightnessDetector()
    complete(predictions, records, settings, lambda: used.append(detector) or detector, root=root)
    return predictions, used


def test_predictions_are_those_of_the_detector(folder, records, root):
    predictions, _ = finish(folder, records, root)
    expected = list(judge(BrightnessDetector(), records, root=root))
    assert predictions.outcomes(UNDISTURBED, with_references=True) == expected
    bare = [dataclasses.replace(o, reference="") for o in expected]
    assert predictions.outcomes(UNDISTURBED, with_references=False) == bare
    blurred = list(judge(BrightnessDetector(), records, root=root, transform=Disturbance("blur", 1), max_new_tokens=0))
    assert predictions.outcomes("blur 1", with_references=False) == blurred
    assert rows(folder)[4] == {
        "condition": "undisturbed", "index": 4, "image": "gan/0.png", "group": "gan", "label": 0, "verdict": 0,
        "probability": 20 / 255, "logit": None, "explanation": "This is a fake image. It is bright.", "error": None,
    }  # fmt: skip
    assert len(rows(folder)) == 27


def test_an_interrupted_run_goes_on_where_it_stopped(folder, records, root):
    with pytest.raises(KeyboardInterrupt):
        finish(folder, records, root, detector=BrightnessDetector(stop_after=4))
    assert [row["index"] for row in rows(folder)] == [0, 1, 2, 3]
    second = BrightnessDetector()
    predictions, _ = finish(folder, records, root, detector=second)
    assert [call["images"] for call in second.calls] == [5, 9, 9]
    whole = prepare_folder(folder.parent / "whole", IDENTITY)
    expected, _ = finish(whole, records, root)
    for condition in DISTURBED.conditions:
        assert predictions.outcomes(condition, with_references=True) == expected.outcomes(
            condition, with_references=True
        )
    assert rows(folder) == rows(whole)


def test_a_finished_run_loads_no_model_and_more_conditions_judge_only_themselves(folder, records, root):
    finish(folder, records, root, RunSettings())
    assert finish(folder, records, root, RunSettings())[1] == []
    more = BrightnessDetector()
    assert finish(folder, records, root, detector=more)[1] == [more]
    assert [(call["transform"], call["max_new_tokens"]) for call in more.calls] == [
        (disturbance, 0) for disturbance in DISTURBED.disturbances
    ]


def test_an_image_that_could_not_be_read_is_judged_again(folder, records, root, monkeypatch):
    def failing(path):
        if path in (records[2].image, records[5].image):
            raise OSError(f"image {path} cannot be read: stale file handle")
        return read_image(path)

    monkeypatch.setattr("detectors.read_image", failing)
    first, _ = finish(folder, records, root, RunSettings())
    assert "stale file handle" in first.outcomes(UNDISTURBED, with_references=False)[2].error
    monkeypatch.undo()
    again = BrightnessDetector()
    predictions, _ = finish(folder, records, root, RunSettings(), again)
    assert [call["images"] for call in again.calls] == [2]
    expected = list(judge(BrightnessDetector(), records, root=root))
    assert predictions.outcomes(UNDISTURBED, with_references=True) == expected
    assert finish(folder, records, root, RunSettings())[1] == []
    assert len(rows(folder)) == 11


def test_without_a_head_a_verdict_needs_words(folder, records, root):
    detector = BrightnessDetector(has_head=False)
    finish(folder, records, root, DISTURBED, detector)
    assert [call["max_new_tokens"] for call in detector.calls] == [35, VERDICT_TOKENS, VERDICT_TOKENS]
    little = prepare_folder(folder.parent / "little", IDENTITY)
    detector = BrightnessDetector(has_head=False, room=25)
    finish(little, records, root, DISTURBED, detector)
    assert [call["max_new_tokens"] for call in detector.calls] == [10, 10, 10]
    short = prepare_folder(folder.parent / "short", IDENTITY)
    detector = BrightnessDetector(has_head=False)
    finish(short, records, root, dataclasses.replace(DISTURBED, max_new_tokens=3), detector)
    assert {call["max_new_tokens"] for call in detector.calls} == {3}
    none = prepare_folder(folder.parent / "none", IDENTITY)
    with pytest.raises(ValueError, match="max_new_tokens is 0; it must be positive: without a real/fake head"):
        finish(none, records, root, RunSettings(max_new_tokens=0), BrightnessDetector(has_head=False))


@pytest.mark.parametrize("cut", [1, 30, 90])
def test_a_line_that_was_cut_off_is_judged_again(folder, records, root, cut):
    finish(folder, records, root, RunSettings())
    file = folder / "predictions.jsonl"
    before, content = rows(folder), file.read_bytes()
    file.write_bytes(content[:-cut])
    again = BrightnessDetector()
    finish(folder, records, root, RunSettings(), again)
    assert again.calls[0]["images"] == 1
    assert rows(folder) == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no JSON", "Expecting value"),
        ("[]", "it is no object"),
        (
            '{"index": 1, "image": "real/1.png", "verdict": 1, "error": null}',
            "it lacks condition, probability, logit, expl",
        ),
        ({"index": 99}, "index is 99; it must be from 0 to 8"),
        ({"index": "1"}, "index is '1'"),
        ({"index": -1}, "index is -1"),
        ({"image": "else.png"}, r"image is 'else\.png'; it must be real/0\.png"),
        ({"verdict": 3}, "verdict is 3"),
        ({"probability": 2}, "probability is 2"),
        ({"probability": "high"}, "must be real number"),
    ],
)
def test_a_damaged_line_is_named(folder, records, root, line, message):
    finish(folder, records, root, RunSettings())
    file = folder / "predictions.jsonl"
    if isinstance(line, dict):
        line = json.dumps({**rows(folder)[0], **line})
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(
        ValueError, match=rf"predictions\.jsonl, line 10 is no prediction of this evaluation: .*{message}"
    ):
        Predictions(folder, records, root)


def test_names_that_are_no_text(folder, records, root):
    odd = records[0].image.rename(root / "real" / "\udcff.png")
    records = [dataclasses.replace(records[0], image=odd), *records[1:]]
    finish(folder, records, root, RunSettings())
    assert rows(folder)[0]["image"] == "real/\udcff.png"
    predictions, used = finish(folder, records, root, RunSettings())
    assert used == []
    assert predictions.outcomes(UNDISTURBED, with_references=False)[0].verdict == 1


def test_progress_counts_every_outcome(folder, records, root):
    seen = []
    predictions = Predictions(folder, records, root)
    complete(predictions, records, DISTURBED, BrightnessDetector, root=root, progress=lambda: seen.append(1))
    assert len(seen) == 27


def test_the_same_evaluation_may_go_on(folder):
    before = (folder / "run.json").read_bytes()
    assert prepare_folder(folder, IDENTITY) == folder
    assert (folder / "run.json").read_bytes() == before
    assert [path.name for path in folder.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "x"}, "an evaluation with another model: it cannot be continued"),
        ({"data": "x"}, "an evaluation with other data"),
        ({"model": "x", "data": "x"}, "another model; other data"),
        ({"settings": {"question": None, "max_tokens": 6}}, "max_tokens 5, now 6"),
        ({"settings": {"question": "Well?", "max_tokens": 5}, "model": "x"}, "question None, now 'Well\\?': it"),
    ],
)
def test_another_evaluation_is_refused(folder, changes, message):
    other = {**IDENTITY, **changes}
    (folder / "predictions.jsonl").write_text('{"half": ')  # a first start that got no further binds nobody
    prepare_folder(folder, other)
    stored = json.loads((folder / "run.json").read_text())
    assert {name: stored[name] for name in other} == other
    prepare_folder(folder, IDENTITY)
    (folder / "predictions.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=message):
        prepare_folder(folder, other)


def test_a_run_that_was_killed_at_its_first_file_begins_again(tmp_path):
    (tmp_path / ".run.json.partial").write_text("{")
    assert prepare_folder(tmp_path, IDENTITY) == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"schema": 1, "kind": "x"}'])
def test_a_folder_that_is_not_ours_is_refused(tmp_path, content):
    other = tmp_path / "other"
    other.mkdir()
    (other / ".run.json.partial").write_text("{")
    assert prepare_folder(other, IDENTITY) == other  # empty ones are welcome, and those with halves of files
    (other / "run.json").write_text(content)
    with pytest.raises(ValueError, match="does not say what was evaluated"):
        prepare_folder(other, IDENTITY)
    (other / "run.json").rename(other / "thesis.txt")
    with pytest.raises(ValueError, match=r"out is '.*other, which holds thesis\.txt'; it must be a new folder"):
        prepare_folder(other, IDENTITY)
    with pytest.raises(ValueError, match="a file'; it must be a new folder"):
        prepare_folder(other / "thesis.txt", IDENTITY)
    (tmp_path / "run.json").write_text(json.dumps({**IDENTITY, "schema": 9, "kind": "unigendet evaluate detection"}))
    with pytest.raises(ValueError, match="schema and kind"):
        prepare_folder(tmp_path, IDENTITY)


def test_the_data_s_hash_sees_what_verdicts_depend_on(records, root, tmp_path):
    before = data_hash(records, root)
    assert before == data_hash(list(records), root)
    moved = root.rename(tmp_path / "moved")
    elsewhere = [dataclasses.replace(r, image=moved / r.image.relative_to(root)) for r in records]
    assert data_hash(elsewhere, moved) == before
    for changed in (
        elsewhere[:-1],
        elsewhere[::-1],
        [*elsewhere[:-1], dataclasses.replace(elsewhere[-1], label=1)],
        [*elsewhere[:-1], dataclasses.replace(elsewhere[-1], answer="x")],
    ):
        assert data_hash(changed, moved) != before
    elsewhere[0].image.write_bytes(b"another picture")
    other = data_hash(elsewhere, moved)
    elsewhere[0].image.unlink()
    assert len({before, other, data_hash(elsewhere, moved)}) == 3  # and a missing one is no error
