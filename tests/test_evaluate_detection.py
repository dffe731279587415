"""``unigendet evaluate detection``: what it leaves, resuming, and one line for every mistake."""

import json
import math
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from tiny_encoder import write_encoder
from tiny_models import tiny_model

from unigendet.cli import main
from unigendet.config import DataConfig, ImageConfig
from unigendet.data.tokenizer import train_tokenizer
from unigendet.inference.calibration import Calibration
from unigendet.inference.pipeline import Pipeline
from unigendet.model.autoencoder import PixelAutoencoder

ANSWERS = ("This is a fake image. It is pale.", "This is a real image. It is dark.")
NAME = "unigendet evaluate detection"
READING = f"{NAME}: reading model and data\n"  # before the hashes, which may take minutes
VIEW = ImageConfig(min_size=8, max_size=8, stride=2)


def save_model(folder, **changes):
    model = tiny_model(vocab_size=280, **changes)
    tokenizer = train_tokenizer([*ANSWERS, "Real?"], 270)
    Pipeline(model, tokenizer, PixelAutoencoder(model.config.latent), DataConfig(VIEW, VIEW)).save(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def annotations(tmp_path):
    """Twelve 8×8 images of two categories, each with both labels."""
    rng, entries = np.random.default_rng(0), []
    (tmp_path / "data").mkdir()
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / "data" / f"{i}.png")
        turns = [{"from": "human", "value": f"<image>Real {i}?"}, {"from": "gpt", "value": ANSWERS[i % 2]}]
        entries.append({"image": f"{i}.png", "label": i % 2, "cate": "ab"[i // 6], "conversations": turns})
    file = tmp_path / "data" / "annotations.json"
    file.write_text(json.dumps(entries))
    return file


@pytest.fixture
def evaluate(capsys, model, annotations, tmp_path, monkeypatch):
    """Runs the command, with a model, data and folder unless others are given; (exit code, output, errors)."""
    monkeypatch.setattr("unigendet.commands.progress.EVERY", math.inf)  # its lines depend on the clock

    def run(*arguments, model=model, data=annotations, out=tmp_path / "out"):
        capsys.readouterr()
        command = ["evaluate", "detection", "--model", model, "--data", data, "--out", out, *arguments]
        try:
            code = main([str(part) for part in command])
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return run


def results(folder):
    return json.loads((folder / "evaluation.json").read_text(), parse_constant=pytest.fail)


def test_what_it_leaves(evaluate, tmp_path, model):
    code, out, err = evaluate("--max-tokens", 4, "--robustness", "--blur", "1.5")
    assert (code, err) == (0, READING)
    assert "overall" in out
    assert f"The report: {tmp_path / 'out' / 'evaluation.html'}" in out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "evaluation.html", "evaluation.json", "predictions.jsonl", "run.json",
    ]  # fmt: skip
    data = results(tmp_path / "out")
    assert data["detection"]["overall"]["count"] == 12
    assert [(g["group"], g["real"], g["fake"]) for g in data["detection"]["groups"]] == [("a", 3, 3), ("b", 3, 3)]
    assert {kind: [p["level"] for p in points] for kind, points in data["robustness"].items()} == {
        "jpeg": [None, 95, 85, 75, 50, 30], "resize": [None, 0.75, 0.5, 0.25], "blur": [None, 1.5],
    }  # fmt: skip
    settings = data["settings"]
    assert (settings["max_tokens"], settings["latent_view"], settings["limit"]) == (4, True, None)
    assert settings["model"]["folder"] == str(model)
    assert data["environment"]["versions"]["torch"]
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 12 * 10
    # The JPEG files differ from the images, and so do the probabilities.
    by_condition = {row["condition"]: row["probability"] for row in rows if row["index"] == 3}
    assert len(set(by_condition.values())) == 10


def test_a_kind_without_levels_means_its_usual_ones(evaluate, tmp_path):
    assert evaluate("--max-tokens", 0, "--resize", "--jpeg", "80")[0] == 0
    levels = {kind: [p["level"] for p in points] for kind, points in results(tmp_path / "out")["robustness"].items()}
    assert levels == {"jpeg": [None, 80], "resize": [None, 0.75, 0.5, 0.25]}


def test_a_pipe_among_the_images_is_not_waited_for(evaluate, annotations, tmp_path):
    (annotations.parent / "3.png").unlink()
    os.mkfifo(annotations.parent / "3.png")
    assert evaluate("--max-tokens", 0)[0] == 0
    assert "is a pipe or a device" in results(tmp_path / "out")["unreadable"][0]["error"]


def test_verdicts_are_those_of_the_pipeline(evaluate, annotations, tmp_path, model):
    evaluate("--max-tokens", 3)
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    images = [annotations.parent / f"{i}.png" for i in range(12)]
    detections = Pipeline.from_pretrained(model).detect(
        images, question=[f"Real {i}?" for i in range(12)], max_new_tokens=3
    )
    for row, one in zip(rows, detections, strict=True):
        assert (row["verdict"], row["explanation"]) == (int(one.real), one.explanation)
        assert row["probability"] == pytest.approx(one.probability, abs=1e-6)
    evaluate("--max-tokens", 3, "--question", "Real 3?", "--no-latent", out=tmp_path / "other")
    others = [json.loads(line) for line in (tmp_path / "other" / "predictions.jsonl").read_text().splitlines()]
    assert all(a["probability"] != b["probability"] for a, b in zip(rows, others, strict=True))


def test_again_and_with_more(evaluate, tmp_path, monkeypatch):
    evaluate("--max-tokens", 0)
    first = (tmp_path / "out" / "evaluation.html").read_bytes()
    code, _, err = evaluate("--max-tokens", 0, "--batch-size", 3, "--jpeg", 50)
    assert code == 0
    assert err == f"{READING}{NAME}: {tmp_path / 'out'} has 12 of 24 verdicts already\n"
    assert list(results(tmp_path / "out")["robustness"]) == ["jpeg"]
    monkeypatch.setattr("unigendet.commands.evaluate_detection.load_pipeline", lambda options: pytest.fail("loaded"))
    evaluate("--max-tokens", 0)
    assert (tmp_path / "out" / "evaluation.html").read_bytes() == first
    for arguments, message in (
        (["--max-tokens", 1], "max_tokens 0, now 1"),
        (["--max-tokens", 0, "--no-latent"], "latent_view True, now False"),
        (["--max-tokens", 0, "--limit", 4], "limit None, now 4"),
    ):
        code, out, err = evaluate(*arguments)
        assert (code, out) == (1, "")
        assert message in err
        assert len(err.removeprefix(READING).splitlines()) == 1


def test_a_continued_run_has_the_same_longest_answer(evaluate, annotations, tmp_path, monkeypatch):
    entries = json.loads(annotations.read_text())
    entries[1]["conversations"][0]["value"] = "<image>" + "Is it? " * 14  # of the model's 128 positions
    annotations.write_text(json.dumps(entries[:4]))
    lengths, detect = [], Pipeline.detect

    def recorded(self, images, **options):
        lengths.append((len(images), options["max_new_tokens"]))
        return detect(self, images, **options)

    monkeypatch.setattr(Pipeline, "detect", recorded)
    assert evaluate()[0] == 0
    file = tmp_path / "out" / "predictions.jsonl"
    whole = file.read_text()
    file.write_text("".join(whole.splitlines(keepends=True)[:2]))
    assert evaluate()[0] == 0
    (_, first), (left, second) = lengths
    assert (left, second) == (2, first)
    assert 0 < first < 60
    explanations = [
        [json.loads(line)["explanation"] for line in text.splitlines()] for text in (whole, file.read_text())
    ]
    assert explanations[0] == explanations[1]


def test_a_failed_first_start_does_not_block_its_folder(evaluate, tmp_path):
    code, _, err = evaluate("--max-tokens", 5000)
    assert (code, "max_new_tokens (--max-tokens) is 5000" in err) == (1, True)
    code, _, err = evaluate("--max-tokens", 2)
    assert (code, err) == (0, READING)
    assert results(tmp_path / "out")["settings"]["max_tokens"] == 2
    assert json.loads((tmp_path / "out" / "run.json").read_text())["settings"]["max_tokens"] == 2


def test_a_changed_model_or_image_is_another_evaluation(evaluate, annotations, model, tmp_path):
    evaluate("--max-tokens", 0)
    other = save_model(tmp_path / "other", seed=1)
    assert "an evaluation with another model" in evaluate("--max-tokens", 0, model=other)[2]
    Image.new("L", (8, 8), 3).save(annotations.parent / "5.png")
    assert "an evaluation with other data" in evaluate("--max-tokens", 0)[2]


def test_what_no_verdict_follows_from_may_change_in_the_folder(evaluate, model, tmp_path, monkeypatch):
    own = shutil.copytree(model, tmp_path / "own")
    assert evaluate("--max-tokens", 0, model=own)[0] == 0
    (own / "calibration.json").write_text("{}")
    (own / "README.txt").write_text("mine")
    (own / "generation.json").write_text('{"num_timesteps": 3}')
    monkeypatch.setattr("unigendet.commands.evaluate_detection.load_pipeline", lambda options: pytest.fail("loaded"))
    assert evaluate("--max-tokens", 0, model=own)[0] == 0
    views = json.loads((own / "data.json").read_text())
    (own / "data.json").write_text(json.dumps(views | {"question": "Is it?"}))
    assert "an evaluation with another model" in evaluate("--max-tokens", 0, model=own)[2]


def test_folders_and_a_limit(evaluate, annotations, tmp_path):
    for i in range(12):
        target = tmp_path / "folders" / ("real" if i % 2 else f"fake/{'xy'[i // 6]}")
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(annotations.parent / f"{i}.png", target)
    code, out, _ = evaluate("--limit", 6, "--max-tokens", 2, data=tmp_path / "folders")
    assert code == 0
    assert "Only 6 of the data set's 12 images were judged" in " ".join(out.split())
    data = results(tmp_path / "out")
    assert [(g["group"], g["count"]) for g in data["detection"]["groups"]] == [("real", 3), ("x", 1), ("y", 2)]
    assert data["explanation_measures"] == {"rouge_l": False, "tfidf_cosine": False, "css": None}
    assert data["detection"]["overall"]["text_accuracy"] == 0.0  # two tokens are no sentence


def test_one_class_only(evaluate, tmp_path, annotations):
    entries = [entry for entry in json.loads(annotations.read_text()) if entry["label"] == 1]
    annotations.write_text(json.dumps(entries))
    code, out, _ = evaluate("--max-tokens", 0)
    assert code == 0
    assert "All images are real." in out
    overall = results(tmp_path / "out")["detection"]["overall"]
    assert (overall["roc_auc"], overall["f1"]) == (None, None)


def test_unreadable_images_are_wrong_and_no_error(evaluate, annotations, tmp_path):
    (annotations.parent / "3.png").write_bytes(b"no image")
    (annotations.parent / "4.png").write_bytes(b"")
    code, out, err = evaluate("--max-tokens", 0, "--jpeg", 50)
    assert (code, err) == (0, READING)
    assert "Images that could not be judged: 2." in out
    data = results(tmp_path / "out")
    overall = data["detection"]["overall"]
    assert (overall["count"], overall["unparsed"], overall["unreadable"]) == (12, 2, 2)
    assert data["robustness"]["jpeg"][1]["unparsed"] == 2
    assert "3.png" in data["unreadable"][0]["error"]


def test_missing_images_are_an_error_before_the_model_loads(evaluate, annotations, tmp_path, monkeypatch):
    monkeypatch.setattr("unigendet.commands.evaluate_detection.load_pipeline", lambda options: pytest.fail("loaded"))
    (tmp_path / "elsewhere").mkdir()
    for arguments, message in (
        (
            ["--image-root", tmp_path / "elsewhere"],
            f"12 of 12 images do not exist, the first is {tmp_path}/elsewhere/0",
        ),
        ([], f"1 of 12 images do not exist, the first is {annotations.parent}/4.png; --image-root says what paths are"),
    ):
        (annotations.parent / "4.png").unlink(missing_ok=True)
        code, out, err = evaluate("--max-tokens", 0, *arguments)
        assert (code, out) == (1, "")
        assert message in err
        assert len(err.removeprefix(READING).splitlines()) == 1
        assert not (tmp_path / "out").exists()


def test_a_model_without_a_head(evaluate, tmp_path):
    headless = save_model(tmp_path / "headless", class_head=False)
    code, _, err = evaluate("--max-tokens", 0, model=headless)
    assert code == 1
    assert "max_new_tokens is 0; it must be positive: without a real/fake head" in err
    code, out, _ = evaluate("--max-tokens", 3, "--jpeg", 50, model=headless, out=tmp_path / "words")
    assert code == 0
    assert "The model has no real/fake head" in out
    data = results(tmp_path / "words")
    assert data["detection"]["overall"]["unparsed"] == 12  # three tokens of a model that says nothing
    assert (data["roc"], data["reliability"], data["detection"]["overall"]["roc_auc"]) == (None, None, None)


def test_a_model_without_a_head_and_with_little_room(evaluate, tmp_path):
    """Its verdicts on disturbed images are as short as there is room for, too."""
    headless = save_model(tmp_path / "headless", class_head=False, max_position=40)
    code, _, err = evaluate("--blur", 1, model=headless)
    assert (code, err) == (0, READING)
    assert len((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()) == 24


def test_calibration_moves_the_verdicts(evaluate, tmp_path):
    Calibration(temperature=2.0, threshold=0.999).save(tmp_path / "strict.json")
    Calibration(unsure=(0.0, 1.0)).save(tmp_path / "unsure.json")
    evaluate("--max-tokens", 0, "--calibration", tmp_path / "strict.json")
    confusion = results(tmp_path / "out")["detection"]["confusion"]
    assert {label: row["fake"] for label, row in confusion.items()} == {"real": 6, "fake": 6}
    code, _, err = evaluate("--max-tokens", 0, "--calibration", tmp_path / "unsure.json")
    assert (code, "calibration" in err) == (1, True)
    evaluate("--max-tokens", 0, "--calibration", tmp_path / "unsure.json", out=tmp_path / "shy")
    overall = results(tmp_path / "shy")["detection"]["overall"]
    assert (overall["accuracy"], overall["unsure"]) == (0.0, 12)


def test_a_calibration_needs_its_question(evaluate, tmp_path):
    """Annotations bring their own, which it was not fitted with; a refusal leaves nothing."""
    Calibration(question="Real?").save(tmp_path / "c.json")
    code, _, err = evaluate("--max-tokens", 0, "--calibration", tmp_path / "c.json")
    assert (code, len(err.splitlines())) == (1, 1)
    assert "the calibration was fitted with the question 'Real?'; give --question with it" in err
    assert not (tmp_path / "out").exists()
    code, _, err = evaluate("--max-tokens", 0, "--calibration", tmp_path / "c.json", "--question", "Real?")
    assert (code, err) == (0, READING)


def test_a_sentence_encoder(evaluate, tmp_path):
    folder = tmp_path / "encoder"
    write_encoder(folder)
    code, _, err = evaluate("--max-tokens", 4, "--sentence-encoder", folder)
    assert (code, err) == (0, READING)
    data = results(tmp_path / "out")
    assert data["explanation_measures"]["css"]["name"] == "encoder"
    assert -1 <= data["detection"]["overall"]["css"] <= 1
    evaluate("--max-tokens", 4)
    assert results(tmp_path / "out")["detection"]["overall"]["css"] is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "holds an empty list; it must hold a non-empty list"),
        ("{", "is not JSON"),
        ('{"image": "0.png"}', "holds a dict"),
        ("[3]", "entry 0 is a int"),
        ('[{"image": "0.png"}]', "entry 0 has no field 'label'"),
        ('[{"image": "0.png", "label": 2}]', "field 'label' is 2; it must be 1 (real) or 0 (fake)"),
        ('[{"image": "0.png", "label": "fake"}]', "field 'label' is 'fake'"),
    ],
)
def test_bad_annotations(evaluate, annotations, content, message, tmp_path):
    annotations.write_text(content)
    code, out, err = evaluate()
    assert (code, out) == (1, "")
    assert message in err
    assert len(err.removeprefix(READING).splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_mistakes(evaluate, annotations, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    cases = [
        ([], {"model": tmp_path / "nowhere"}, "no model folder at"),
        ([], {"model": tmp_path / "empty"}, "no weights in"),
        ([], {"data": tmp_path / "nowhere"}, "does not exist"),
        ([], {"data": tmp_path / "empty"}, "no sub-folders"),
        ([], {"out": annotations}, "a file"),
        ([], {"out": tmp_path / "full"}, "which holds thesis.txt"),
        (["--image-root", tmp_path / "x"], {"data": tmp_path / "full"}, "--image-root is"),
        (["--sentence-encoder", tmp_path / "nowhere"], {}, "there is no sentence encoder at"),
        (["--calibration", tmp_path / "nowhere"], {}, "does not exist"),
        (["--limit", 0], {}, "--limit is 0; it must be at least 1"),
        (["--batch-size", 0], {}, "--batch-size is 0"),
        (["--max-tokens", -1], {}, "--max-tokens is -1; it must be at least 0"),
        (["--jpeg", 101], {}, "--jpeg: level of jpeg is 101"),
        (["--resize", 2], {}, "--resize: level of resize is 2.0; it must be between 0 and 1"),
        (["--blur", "nan"], {}, "--blur: level of blur is nan"),
        (["--device", "warp"], {}, "device is 'warp'"),
        (["--autoencoder", tmp_path / "ae.safetensors"], {}, "ae.safetensors"),
    ]
    for i, (arguments, changes, message) in enumerate(cases):
        code, out, err = evaluate(*arguments, **{"out": tmp_path / f"out{i}", **changes})
        assert (code, out) == (1, ""), message
        assert err.removeprefix(READING).startswith(f"{NAME}: ")
        assert message in err
        assert len(err.removeprefix(READING).splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--jpeg", "many"], "invalid int value"), (["--speed"], "unrecognized arguments: --speed")],
)
def test_wrong_command_lines(evaluate, arguments, message):
    code, out, err = evaluate(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith(f"{NAME}: ")
    assert err.endswith(f"; see {NAME} --help\n")


def test_help(capsys):
    for arguments, words in (
        (["evaluate", "--help"], ["detection", "Score a model's verdicts and explanations"]),
        (["evaluate", "detection", "--help"], ["--robustness", "--jpeg [Q ...]", "goes on where it stopped"]),
    ):
        with pytest.raises(SystemExit, match="0"):
            main(arguments)
        text = " ".join(capsys.readouterr().out.split())
        assert all(word in text for word in words)
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate"])
    assert "required: COMMAND" in capsys.readouterr().err
