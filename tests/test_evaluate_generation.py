"""``unigendet evaluate generation``: from prompts or a folder of pictures to ``generation.json``."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from command_runs import fails, run_command, save_model
from PIL import Image

from unigendet.commands.evaluate_generation import _described
from unigendet.data.quickstart import caption, load_digits, write_png
from unigendet.evaluation.contact_sheet import SheetRow, save_contact_sheet
from unigendet.inference import pipeline as pipeline_module


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def evaluate(capsys):
    return lambda *arguments: run_command(capsys, "evaluate", "generation", *arguments)


@pytest.fixture
def captions(tmp_path):
    """Ten prompts, as LAION annotations."""
    entries = [{"image_path": f"{digit}.png", "prompt": caption(digit)} for digit in range(10)]
    (tmp_path / "captions.json").write_text(json.dumps(entries))
    return tmp_path / "captions.json"


def test_from_prompts_to_scores(evaluate, model_folder, captions, tmp_path, monkeypatch):
    monkeypatch.setattr("unigendet.commands.progress.EVERY", 0)  # a line for every picture
    out = tmp_path / "out"
    base = ("--model", model_folder, "--prompts", captions, "--features", "digits", "--steps", 3, "--seed", 5,
            "--batch-size", 4, "--out", out, "--grid", tmp_path / "grid.png")  # fmt: skip
    result = evaluate(*base)
    assert result.code == 0
    assert result.lines[0] == f"{out / 'images' / '00000.png'}\tseed 5\t{caption(0)}"
    assert result.lines[10:12] == ["generated images  10", "real images       397"]
    assert result.lines[-1] == f"The numbers: {out / 'generation.json'}"
    said = [line.removeprefix("unigendet evaluate generation: ") for line in result.err.splitlines()]
    assert said[0].startswith("1 of 10 pictures, about ")
    assert [line for line in said if line.startswith("note: ") and "10 images for 20 features" in line]
    first = (out / "generation.json").read_bytes()
    scores = json.loads(first)
    assert scores["counts"] == {"images": 10, "reference": 397, "dimensions": 20}
    assert scores["agreement"]["digit_counts"] == {str(digit): 1 for digit in range(10)}
    assert scores["settings"] == {
        "features": "digits",
        "image_root": None,
        "prompts": str(captions),
        "model": str(model_folder),
        "weights": json.loads((out / "images" / "manifest.jsonl").read_text().splitlines()[0])["weights"],
        "dtype": "float32",
        "guidance": scores["settings"]["guidance"],
        "seeds": list(range(5, 15)),
        "images_per_prompt": 1,
        "sizes": [[8, 8]],
    }
    assert scores["settings"]["guidance"]["num_timesteps"] == 3
    assert Image.open(tmp_path / "grid.png").height > 10 * 160

    def none(*arguments, **options):
        raise AssertionError("a picture was made again")

    monkeypatch.setattr(pipeline_module, "generate_latents", none)
    again = evaluate(*base)
    assert again.code == 0
    assert (out / "generation.json").read_bytes() == first
    Image.new("L", (8, 8)).save(out / "images" / "stranger.png")
    folder = evaluate("--images", out / "images", "--features", "digits", "--out", tmp_path / "other")
    assert folder.code == 0
    other = json.loads((tmp_path / "other" / "generation.json").read_text())
    assert "1 files of" in folder.err
    assert "are not in its manifest.jsonl and are left out" in folder.err
    shared = ("features", "image_root", "weights", "dtype", "guidance", "seeds", "sizes")
    assert other["settings"] == {
        "images": str(out / "images"), "left_out": 1, **{key: scores["settings"][key] for key in shared}
    }  # fmt: skip
    same = ("counts", "frechet_distance", "agreement", "real", "warnings")
    assert [other[key] for key in same] == [scores[key] for key in same]


def manifest_of(folder, *entries):
    """A manifest of digits, made for the entries' files."""
    shared = {"prompt": caption(0), "seed": 0, "size": [8, 8], "weights": "w", "dtype": "float32", "guidance": {"s": 1}}
    folder.mkdir()
    lines = []
    for i, entry in enumerate(entries):
        write_png(folder / f"{i}.png", load_digits().test_images[i])
        lines.append(json.dumps({"file": f"{i}.png", **shared, **entry}) + "\n")
    (folder / "manifest.jsonl").write_text("".join(lines))
    return folder


@pytest.mark.parametrize("change", [{"weights": "x"}, {"dtype": "bfloat16"}, {"guidance": {"s": 2}}])
def test_pictures_made_in_different_ways_are_not_scored_together(evaluate, tmp_path, change):
    folder = manifest_of(tmp_path / "made", {}, {"seed": 1}, change)
    result = evaluate("--images", folder, "--features", "digits", "--out", tmp_path / "out")
    fails(result, f"0.png and 2.png differ in {next(iter(change))}; score each kind alone")


def test_a_picture_of_the_manifest_is_lost(evaluate, tmp_path):
    folder = manifest_of(tmp_path / "made", {}, {}, {})
    (folder / "1.png").unlink()
    result = evaluate("--images", folder, "--features", "digits", "--out", tmp_path / "out")
    fails(result, f"lacks pictures of its manifest.jsonl, 1 of 3: {folder / '1.png'}")


def test_generated_and_real_pictures_are_kept_apart(evaluate, model_folder, tmp_path, monkeypatch):
    """A picture of both sets, and a place where generated pictures would become real ones."""

    class Features:
        sha256 = "0" * 64

        def __init__(self, *arguments):
            pass

    monkeypatch.setattr("unigendet.evaluation.inception.InceptionFeatures", Features)
    real = tmp_path / "real"
    made = manifest_of(tmp_path / "made", {}, {})
    shutil.copytree(made, real, ignore=shutil.ignore_patterns("*.jsonl"))
    (real / "link.png").symlink_to(made / "1.png")
    inception = ("--features", "inception", "--inception-weights", tmp_path / "w.pth", "--device", "cpu")
    result = evaluate("--images", made, "--reference", real, *inception, "--out", tmp_path / "out")
    fails(result, f"{made / '1.png'} is among the generated pictures and among the reference; they must be apart")
    entries = [{"prompt": "a", "image_path": f"out/images/0000{i}.png"} for i in range(2)]
    for entry in entries:
        (tmp_path / entry["image_path"]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(made / "0.png", tmp_path / entry["image_path"])
    (tmp_path / "p.json").write_text(json.dumps(entries))
    asked = ("--model", model_folder, "--prompts", tmp_path / "p.json", *inception)
    fails(evaluate(*asked, "--out", tmp_path / "out"), "00000.png is among the generated pictures and among the ref")
    below = evaluate(*asked, "--reference", real, "--out", real / "scores")
    fails(below, f"--out {real / 'scores'} lies in the folder of real images, {real}; generated pictures must not")
    sheet = evaluate(*asked, "--reference", real, "--out", tmp_path / "out", "--grid", real / "grid.png")
    fails(sheet, f"--grid {real / 'grid.png'} lies in the folder of real images")
    assert not (real / "scores").exists()


def test_settings_tell_the_real_images_by_names_and_contents(tmp_path):
    folder = manifest_of(tmp_path / "real", {}, {})
    annotations = tmp_path / "p.json"

    def digest(reference, image_root=None, count=2, base=folder):
        options = SimpleNamespace(reference=reference, prompts=annotations, image_root=image_root)
        described = _described(options, [base / f"{i}.png" for i in range(count)])
        assert described["reference"] == str(reference or annotations)
        return described["reference_sha256"]

    first = digest(folder)
    assert digest(folder / "p.json") == digest(None, image_root=folder) == first  # named from the folder they lie in
    moved = folder.rename(tmp_path / "moved")
    assert digest(moved, base=moved) == first
    others = {first, digest(moved, count=1, base=moved), digest(annotations, base=moved)}
    (moved / "1.png").write_bytes((moved / "0.png").read_bytes())
    others.add(digest(moved, base=moved))
    assert len(others) == 4


def test_a_folder_without_a_manifest(evaluate, tmp_path):
    digits = load_digits()
    (tmp_path / "pictures").mkdir()
    for i, image in enumerate(digits.test_images):
        write_png(tmp_path / "pictures" / f"{i}.png", image)
    picture = tmp_path / "pictures" / "0.png"
    save_contact_sheet(tmp_path / "pictures" / "grid.png", [SheetRow("zero", (picture,), ("",))])
    result = evaluate("--images", tmp_path / "pictures", "--features", "digits", "--out", tmp_path / "out")
    assert result.code == 0
    scores = json.loads((tmp_path / "out" / "generation.json").read_text())
    assert scores["frechet_distance"] == pytest.approx(0, abs=1e-9)
    assert scores["agreement"] is None
    assert scores["settings"]["left_out"] == 1
    assert "1 files of" in result.err
    assert "are contact sheets and are left out" in result.err
    assert "0.png has no known prompt" in result.err


def test_mistakes(evaluate, model_folder, captions, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "generation.json").write_text('{"num_timesteps": 3}')
    for i in range(2):
        Image.fromarray(rng.integers(0, 256, (8, 9), dtype=np.uint8)).save(tmp_path / "pictures" / f"{i}.png")

    def none(*arguments, **options):
        raise AssertionError("a picture was made before the mistake was found")

    monkeypatch.setattr(pipeline_module, "generate_latents", none)
    out = ("--out", tmp_path / "out")
    digits = ("--features", "digits", *out)
    pictures, model = ("--images", tmp_path / "pictures"), ("--model", model_folder)
    inception = ("--features", "inception", "--inception-weights", tmp_path / "w.pth", *out)
    cases = [
        (digits, "give either --model, whose pictures are made first, or --images"),
        ((*digits, *pictures, *model), "give either --model"),
        ((*digits, *model), "--model needs --prompts"),
        ((*digits, *pictures, "--prompts", captions), "--prompts goes with --model, not with --images"),
        ((*digits, *pictures, "--text-scale", 2), "--text-scale goes with --model"),
        ((*digits, *pictures, "--grid", tmp_path / "g.png"), "--grid goes with --model"),
        ((*digits, *pictures, "--batch-size", 0), "--batch-size is 0; it must be at least 1"),
        ((*digits, *pictures), "0.png has 9×8 pixels; a digit must have 8×8"),
        ((*digits, "--images", tmp_path / "lost"), "lost is no folder"),
        ((*digits, "--images", tmp_path / "empty"), "no images in"),
        ((*digits, *pictures, "--reference", captions), "--reference goes with --features inception"),
        ((*digits, *pictures, "--inception-weights", captions), "--inception-weights goes with --features inception"),
        ((*digits, *model, "--prompts", tmp_path / "lost.json"), "lost.json does not exist"),
        ((*digits, *model, "--prompts", captions, "--size", "3x3"), "entry 0 ('a handwritten digit zero'): size is"),
        ((*digits, *model, "--prompts", captions, "--steps", 1), "num_timesteps is 1"),
        ((*inception, *model, "--prompts", captions), "captions.json names images that are not there, 10 of 10: "),
        (("--features", "digits", *pictures, "--out", tmp_path / "taken"),
         "generation.json is there already and holds no scores; name another --out, or give --overwrite"),
    ]  # fmt: skip
    for arguments, message in cases:
        fails(evaluate(*arguments), message)
        assert not (tmp_path / "out" / "generation.json").exists()
    assert (tmp_path / "taken" / "generation.json").read_text() == '{"num_timesteps": 3}'
    wrong = evaluate("--images", tmp_path, *out)
    assert (wrong.code, "required: --features" in wrong.err) == (2, True)
