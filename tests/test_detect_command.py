"""``unigendet detect``: a row per picture, whatever the picture; formats, thresholds, and what can go wrong."""

import io
import json
import os
import sys
import warnings
from pathlib import Path

import pytest
from command_runs import noise_picture, read_rows, run_command, tiny_pipeline
from image_zoo import BAD, GOOD
from PIL import Image

from unigendet.commands import detect as detect_command
from unigendet.commands.rows import cell
from unigendet.inference.calibration import Calibration


def test_a_row_per_picture_in_order(detect, pictures):
    result = detect(pictures, pictures / "b.png", pictures / "**/*.[pw]*", pictures / "b.png")
    assert (result.code, result.err) == (0, "")
    rows = read_rows(result.out, "table")
    # A folder's files come before its sub-folders'; a pattern's matches are sorted; b.png was given twice.
    names = ["a.JPG", "b.png", "more/c.webp", "b.png", "b.png", "more/c.webp", "b.png"]
    assert [row["path"] for row in rows] == [str(pictures / name) for name in names]
    assert rows[1] == rows[3] == rows[4] == rows[6]
    assert {row["verdict"] for row in rows} <= {"real", "fake"}
    assert all((float(row["probability_real"]) >= 0.5) == (row["verdict"] == "real") for row in rows)
    assert {row["error"] for row in rows} == {""}


@pytest.mark.parametrize("separator", ["\n", "\r\n", "\0"])
def test_lists(detect, pictures, tmp_path, monkeypatch, separator):
    lines = ["pictures/b.png", "", "lost.png", str(pictures / "a.JPG"), "pictures", "pictures/b.png"]
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "all").write_bytes(separator.join(lines).encode())
    monkeypatch.chdir(tmp_path)
    result = detect("pictures/more", "--list", "lists/all", "--format", "jsonl", tokens=0)
    rows = read_rows(result.out, "jsonl")
    assert [row["path"] for row in rows] == ["pictures/more/c.webp", *filter(None, lines)]
    assert [row["verdict"] == "error" for row in rows] == [False, False, True, False, True, False]
    assert "image lost.png does not exist" in rows[2]["error"]
    assert "image pictures is a folder" in rows[4]["error"]
    assert result.code == 1
    assert result.err == "unigendet detect: 2 of 6 images were not judged; their rows say why\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(separator.join(lines).encode())))
    same = detect("--list", "-", "--format", "jsonl", tokens=0)
    assert read_rows(same.out, "jsonl") == rows[1:]


def test_formats_agree(detect, pictures, tmp_path):
    (pictures / "text.png").write_text("no picture")
    results = {form: detect(pictures, "--format", form) for form in ("table", "jsonl", "csv")}
    assert {result.code for result in results.values()} == {1}
    rows = {form: read_rows(result.out, form) for form, result in results.items()}
    assert rows["csv"] == rows["jsonl"]
    for row, line in zip(rows["csv"], rows["table"], strict=True):
        assert {**row, "explanation": cell(" ".join(row["explanation"].split()))} == line
    for name in ("x.jsonl", "x.csv", "x.txt", "new/folder/x.CSV"):
        form = {"jsonl": "jsonl", "csv": "csv", "CSV": "csv"}.get(name.split(".")[1], "table")
        written = detect(pictures, "--out", tmp_path / name)
        assert (written.code, written.out) == (1, "")
        assert (tmp_path / name).read_text() == results[form].out
    again = detect(pictures, "--out", tmp_path / "x.csv")
    assert again.code == 1
    assert "x.csv holds something already; remove it or choose another name" in again.err
    assert (tmp_path / "x.csv").read_text() == results["csv"].out


def test_batches_agree_and_runs_are_the_same(detect, pictures):
    for i in range(4):
        noise_picture(10 + i, 20 - i, 7 + 2 * i).save(pictures / f"{i}.png")
    (pictures / "0a.png").write_text("no picture")
    first, second, *others = (detect(pictures, "--format", "jsonl", "--batch-size", size) for size in (3, 3, 1, 2, 16))
    assert first.out == second.out
    expected = [json.loads(line) for line in first.lines]
    assert len(expected) == 8
    for other in others:
        rows = [json.loads(line) for line in other.lines]
        for row, want in zip(rows, expected, strict=True):
            p, q = row.pop("probability_real"), want["probability_real"]
            assert row == {name: value for name, value in want.items() if name != "probability_real"}
            assert p == (None if q is None else pytest.approx(q, abs=1e-6))


@pytest.mark.parametrize("form", ["jsonl", "csv", "table"])
def test_every_kind_of_file(detect, tmp_path, form):
    """Rows in the order of the names, whether or not the pictures can be read."""
    folder = tmp_path / "zoo"
    folder.mkdir()
    for name, kind in (GOOD | BAD).items():
        kind[0](folder / name)
    names = sorted(GOOD | BAD)
    result = detect(*(folder / name for name in names if name != "folder.png"), "--format", form, tokens=0)
    rows = read_rows(result.out, form)
    names.remove("folder.png")  # as an argument, a folder is what it holds
    assert [row["path"] for row in rows] == [str(folder / name) for name in names]
    for name, row in zip(names, rows, strict=True):
        if name in GOOD:
            assert row["verdict"] in ("real", "fake")
            assert row["error"] == ""
        else:
            assert (row["verdict"], row["probability_real"]) == ("error", "")
            assert row["error"].startswith(f"image {folder / name} ")
            assert BAD[name][1] in row["error"]
    assert result.code == 1
    assert (
        result.err == f"unigendet detect: {len(BAD) - 1} of {len(names)} images were not judged; their rows say why\n"
    )


def test_large_pictures_raise_no_warnings(detect, pictures, monkeypatch):
    """Pillow warns between its limit and twice that, where we read on."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9 * 12 - 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = detect(pictures, tokens=0)
    assert (result.code, result.err, caught) == (0, "", [])


def test_a_file_that_vanishes(detect, pictures, monkeypatch):
    find = detect_command.find_pictures

    def find_then_remove(*arguments):
        paths = find(*arguments)
        (pictures / "b.png").unlink()
        return paths

    monkeypatch.setattr(detect_command, "find_pictures", find_then_remove)
    result = detect(pictures, "--format", "csv", tokens=0)
    assert [row["verdict"] == "error" for row in read_rows(result.out, "csv")] == [False, True, False]
    assert result.code == 1


def test_folders_with_links_in_circles(detect, pictures):
    (pictures / "more" / "up").symlink_to(pictures)
    result = detect(pictures, tokens=0)
    assert (result.code, len(result.lines)) == (0, 3)
    assert detect(pictures / "**", tokens=0).lines[:3] == detect(pictures / "**/*.[Jpw]*", tokens=0).lines


@pytest.mark.parametrize("form", ["jsonl", "csv", "table"])
@pytest.mark.parametrize("to_file", [False, True])
def test_names_of_any_characters(detect, tmp_path, form, to_file):
    """Lines stay lines, cells stay cells, and what JSON and CSV hold is the very name."""
    folder = tmp_path / "x"
    folder.mkdir()
    names = [
        "a\nb.png",
        "c\td.png",
        'e",f.png',
        "g\rh.png",
        "é 漢字 😀.png",
        "\x1b[31mred.png",
        os.fsdecode(b"\xff.png"),
    ]
    for name in names:
        noise_picture(0).save(folder / name)
    out = tmp_path / "rows"
    result = detect(
        *(folder / name for name in names), "--format", form, *(["--out", out] if to_file else []), tokens=0
    )
    assert (result.code, result.err) == (0, "")
    text = out.read_bytes().decode() if to_file else result.out
    rows = read_rows(text, form)
    found = [Path(row["path"]).name if form != "table" else row["path"].rpartition("/")[2] for row in rows]
    if form == "jsonl":
        assert found == names
    elif form == "csv":
        assert found == [*names[:-1], "\\udcff.png"]
    else:
        assert found == [
            r"a\nb.png",
            r"c\td.png",
            'e",f.png',
            r"g\rh.png",
            "é 漢字 😀.png",
            r"\x1b[31mred.png",
            r"\udcff.png",
        ]


def test_threshold_and_unsure(detect, pictures, tmp_path):
    def verdicts(*options):
        result = detect(pictures, "--format", "jsonl", *options, tokens=0)
        rows = [json.loads(line) for line in result.lines]
        return [row["probability_real"] for row in rows], [row["verdict"] for row in rows]

    p, _ = verdicts()
    low, middle, high = sorted(p)
    assert verdicts("--threshold", middle) == (p, ["real" if x >= middle else "fake" for x in p])
    between = (low + middle) / 2, (middle + high) / 2
    expected = ["unsure" if x == middle else "real" if x == high else "fake" for x in p]
    assert verdicts("--threshold", middle, "--unsure", *between) == (p, expected)
    Calibration(temperature=2.0, threshold=0.3, unsure=(0.0, 0.9999)).save(tmp_path / "c.json")
    q, unsure = verdicts("--calibration", tmp_path / "c.json")
    assert unsure == ["unsure"] * 3
    odds = [(x / (1 - x)) ** 0.5 for x in p]
    assert q == pytest.approx([x / (1 + x) for x in odds])
    # The command line wins over the file.
    assert verdicts("--calibration", tmp_path / "c.json", "--threshold", 0, "--unsure", 0, 0) == (q, ["real"] * 3)


def test_a_threshold_or_a_band_alone_wins_over_the_file(detect, pictures, tmp_path):
    file = tmp_path / "c.json"
    Calibration(threshold=0.3, unsure=(0.2, 0.4)).save(file)

    def run(*options):
        result = detect(pictures, "--format", "jsonl", *options, tokens=0)
        assert result.code == 0
        return [json.loads(line) for line in result.lines], result.err

    rows, said = run("--calibration", file, "--threshold", 0.9)
    assert said == (
        f"unigendet detect: --threshold 0.9 lies outside the unsure band of {file}, from 0.2 to 0.4; there is no band\n"
    )
    assert rows == run("--threshold", 0.9)[0]
    rows, said = run("--calibration", file, "--threshold", 0.25)
    assert said == ""
    assert rows == run("--threshold", 0.25, "--unsure", 0.2, 0.4)[0]
    for base in (["--calibration", file], []):
        rows, said = run(*base, "--unsure", 0.8, 0.9)  # of odds 4 and 9, so the middle has odds 6
        before = 0.3 if base else 0.5
        assert said == (
            f"unigendet detect: the threshold {before} lies outside --unsure 0.8 0.9; it is 0.857143 instead\n"
        )
        assert rows == run("--threshold", 6 / 7, "--unsure", 0.8, 0.9)[0]
    assert run("--unsure", 0.9, 1)[1].endswith("it is 1 instead\n")
    assert run("--unsure", 0.4, 0.9)[1] == ""


def test_mistakes(detect, pictures, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank").write_text("\n \n")
    (tmp_path / "odd.json").write_text("[]")
    cases = [
        (["--model", tmp_path / "nowhere", pictures], "no model folder at"),
        (["--model", tmp_path / "empty", pictures], "no weights in"),
        ([tmp_path / "empty"], "no images in"),
        ([tmp_path / "*.bmp"], "no file matches the pattern"),
        (["--list", tmp_path / "blank"], "names no pictures"),
        (["--list", tmp_path / "lost"], "cannot be read: No such file"),
        ([pictures, "--out", tmp_path], "is a folder; name a file"),
        ([pictures, "--batch-size", 0], "batch_size is 0"),
        ([pictures, "--max-tokens", -1], "max_new_tokens (--max-tokens) is -1; it must be from 0 to"),
        ([pictures, "--max-tokens", 500], "max_new_tokens (--max-tokens) is 500; it must be from 0 to"),
        ([pictures, "--device", "warp"], "device is 'warp'; it must be"),
        ([pictures, "--autoencoder", "ae.safetensors"], "must be left out with"),
        ([pictures, "--threshold", 1.5], "threshold is 1.5; it must be a probability"),
        (
            [pictures, "--threshold", 0.5, "--unsure", 0.6, 0.9],
            "threshold is 0.5; it must be within the unsure band, from 0.6 to 0.9",
        ),
        ([pictures, "--unsure", 6, 9], "unsure is (6.0, 9.0); it must be 0 ≤ low ≤ high ≤ 1"),
        ([pictures, "--unsure", 0.6, 0.2], "unsure is (0.6, 0.2); it must be 0 ≤ low ≤ high ≤ 1"),
        (
            [pictures, "--calibration", tmp_path / "lost.json"],
            "lost.json does not exist; 'unigendet calibrate' makes one",
        ),
        ([pictures, "--calibration", tmp_path / "odd.json"], "odd.json has the schema None"),
    ]
    for arguments, message in cases:
        result = detect(*arguments)
        assert (result.code, result.out) == (1, "")
        assert result.err.startswith("unigendet detect: ")
        assert message in result.err
        assert len(result.err.splitlines()) == 1
    result = detect()
    assert (result.code, result.out) == (2, "")
    assert "name pictures: PATH, --list, or both" in result.err


def test_a_question_that_is_too_long(detect, pictures):
    """The model has 128 positions: two for the images, three for the delimiters of question and answer."""
    result = detect(pictures, "--question", "?" * 124, tokens=0)
    assert (result.code, result.out) == (1, "")
    assert result.err == (
        "unigendet detect: question (--question) has 124 tokens; it must have at most 123, for a model of 128 "
        "positions\n"
    )
    assert detect(pictures / "b.png", "--question", "?" * 123, tokens=0).code == 0
    assert detect(pictures / "b.png", "--question", "?" * 124, "--no-latent", tokens=0).code == 0


def test_question_and_views_matter(detect, pictures):
    default, *others = (
        [row["probability_real"] for row in read_rows(detect(pictures, *options, tokens=0).out, "table")]
        for options in ((), ("--question", "?"), ("--no-latent",))
    )
    for other in others:
        assert all(a != b for a, b in zip(default, other, strict=True))


def test_without_a_length_the_model_decides(capsys, model_folder, pictures):
    """128 positions leave no room for 256 tokens."""
    result = run_command(capsys, "detect", "--model", model_folder, pictures / "b.png", "--format", "jsonl")
    assert result.code == 0
    assert json.loads(result.out)["explanation"]


def test_a_model_without_a_head(capsys, tmp_path, pictures):
    tiny_pipeline(class_head=False).save(tmp_path / "m")
    base = ["detect", "--model", tmp_path / "m", pictures / "b.png", "--max-tokens", 2]
    assert run_command(capsys, *base).lines[0].startswith(f"{pictures / 'b.png'}\tundecided\t\t")
    assert json.loads(run_command(capsys, *base, "--format", "jsonl").out)["probability_real"] is None
    result = run_command(capsys, *base, "--threshold", 0.6)
    assert result.code == 1
    assert "the model has no real/fake head, only its words; there is no probability to calibrate" in result.err
