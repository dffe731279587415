"""``unigendet generate``: prompts, seeds, images in; pictures, manifest, contact sheet out; mistakes in one line."""

import dataclasses
import errno
import io
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_runs import StandardInput, fails, run_command, save_model, tiny_pipeline
from PIL import Image
from tiny_models import tiny_model

from unigendet.commands.sampling import entries_of
from unigendet.config import GuidanceConfig, ImageConfig
from unigendet.data.image_folder import read_manifest
from unigendet.data.tokenizer import train_tokenizer
from unigendet.inference import pipeline as pipeline_module
from unigendet.inference.requests import ImageRequest

STEPS = ("--steps", 3)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def generate(capsys, model_folder):
    return lambda *arguments: run_command(capsys, "generate", "--model", model_folder, *STEPS, *arguments)


@pytest.fixture
def sampled(monkeypatch):
    """What the sampler gets, call by call: the requests' names with their sizes, and the guidance."""
    calls = []
    inner = pipeline_module.generate_latents

    def recorded(model, requests, guidance, **options):
        calls.append((list(requests), guidance))
        return inner(model, requests, guidance, **options)

    monkeypatch.setattr(pipeline_module, "generate_latents", recorded)
    return calls


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def names(count):
    return [f"{i:05}.png" for i in range(count)]


def pixels(path):
    return np.asarray(Image.open(path), int)


def test_one_picture(generate, tmp_path):
    path = tmp_path / "new" / "one.png"
    result = generate("--prompt", "a\ncat", "--out", path, "--seed", 5)
    assert (result.code, result.err) == (0, "")
    assert result.lines == [f"{path}\tseed 5\ta cat"]
    assert files(path.parent) == ["one.png"]
    picture = Image.open(path)
    assert picture.size == (8, 8)
    assert (picture.info["prompt"], picture.info["seed"]) == ("a\ncat", "5")
    jpeg = generate("--prompt", "a", "--out", tmp_path / "one.JPG")
    assert (jpeg.code, Image.open(tmp_path / "one.JPG").format) == (0, "JPEG")


def test_folder(generate, tmp_path):
    base = ["--prompt", "a", "--prompt", "b", "--size", "4x6"]
    result = generate(*base, "--count", 2, "--out", tmp_path / "out", "--batch-size", 3)
    paths = [tmp_path / "out" / name for name in names(4)]
    assert result.lines == [f"{p}\tseed {i}\t{'aabb'[i]}" for i, p in enumerate(paths)]
    assert result.err == ""
    assert files(tmp_path / "out") == [*names(4), "manifest.jsonl"]
    assert {Image.open(path).size for path in paths} == {(6, 4)}
    # A picture can be made again by its own seed and prompt.
    generate("--prompt", "b", "--seed", 2, "--size", "4x6", "--out", tmp_path / "again.png")
    assert np.abs(pixels(paths[2]) - pixels(tmp_path / "again.png")).max() <= 1
    assert len({path.read_bytes() for path in paths}) == 4


def test_manifest(generate, tmp_path, model_folder):
    generate("--prompt", "süß", "--out", tmp_path / "out", "--seed", 3, "--text-scale", 2)
    (line,) = (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert len(entry.pop("weights")) == 16
    assert entry == {
        "file": "00000.png",
        "prompt": "süß",
        "seed": 3,
        "size": [8, 8],
        "images": [],
        "image_fingerprints": [],
        "guidance": dataclasses.asdict(GuidanceConfig(num_timesteps=3, text_scale=2.0)) | {"interval": [0.4, 1.0]},
        "model": str(model_folder),
        "dtype": "float32",
    }


def test_every_guidance_setting_reaches_the_sampler(generate, tmp_path, sampled, model_folder):
    given = {"num_timesteps": 2, "text_scale": 2.0, "image_scale": 1.25, "interval": (0.1, 0.9), "timestep_shift": 1.5,
             "renorm": "text_channel", "renorm_min": 0.5}  # fmt: skip
    assert set(given) == {field.name for field in dataclasses.fields(GuidanceConfig)}
    generate("--prompt", "a", "--out", tmp_path / "a.png")
    generate("--prompt", "a", "--out", tmp_path / "b.png", "--steps", 2, "--text-scale", 2, "--image-scale", 1.25,
             "--interval", 0.1, 0.9, "--shift", 1.5, "--renorm", "text_channel", "--renorm-min", 0.5)  # fmt: skip
    assert [guidance for _, guidance in sampled] == [GuidanceConfig(num_timesteps=3), GuidanceConfig(**given)]


def test_prompt_files_and_standard_input(generate, tmp_path, monkeypatch, sampled):
    (tmp_path / "p.txt").write_text("a\n\n# b\nc\n")
    entries = ["a", {"prompt": "c", "seed": 40, "size": [4, 6]}, {"image_path": "x.png", "prompt": "d"}]
    (tmp_path / "p.json").write_text(json.dumps(entries))
    text = generate("--prompts", tmp_path / "p.txt", "--out", tmp_path / "text", "--count", 2, "--size", "2x2")
    assert [line.split("\t")[1:] for line in text.lines] == [[f"seed {i}", "aacc"[i]] for i in range(4)]
    StandardInput(monkeypatch, b"# nothing\nc\n")
    piped = generate("--prompts", "-", "--out", tmp_path / "piped.png")
    assert piped.lines == [f"{tmp_path / 'piped.png'}\tseed 0\tc"]
    sampled.clear()
    generate("--prompts", tmp_path / "p.json", "--out", tmp_path / "json", "--count", 2, "--seed", 10)
    manifest = read_manifest(tmp_path / "json").values()
    assert [(e["prompt"], e["seed"]) for e in manifest] == list(zip("aaccdd", (10, 11, 40, 41, 14, 15), strict=True))
    assert [e["size"] for e in manifest] == [[8, 8], [8, 8], [4, 6], [4, 6], [8, 8], [8, 8]]
    assert [request.size for requests, _ in sampled for request in requests][1:3] == [(8, 8), (4, 6)]


def test_seeds_and_contact_sheet(generate, tmp_path):
    out, grid = tmp_path / "out", tmp_path / "sheets" / "grid.png"
    base = ("--prompt", "a", "--prompt", "b", "--seeds", 7, 1, 3, "--out", out, "--grid", grid)
    result = generate(*base)
    assert [line.split("\t")[1:] for line in result.lines] == [[f"seed {s}", p] for p in "ab" for s in (7, 1, 3)]
    sheet = Image.open(grid)
    from unigendet.evaluation.contact_sheet import GAP, LABEL, LINE, MARGIN

    for i, name in enumerate(names(6)):
        left, top = MARGIN + LABEL + i % 3 * (160 + GAP), MARGIN + LINE + i // 3 * (160 + GAP)
        cell = sheet.crop((left, top, left + 160, top + 160)).resize((8, 8), Image.Resampling.NEAREST)
        assert np.array_equal(np.asarray(cell.convert("L")), np.asarray(Image.open(out / name)))
    before = grid.read_bytes()
    again = generate(*base)  # its own sheet is drawn anew
    assert again.code == 0
    assert grid.read_bytes() == before
    assert all(line.endswith("\t(kept)") for line in again.lines)


def test_input_images(generate, tmp_path, sampled):
    rng = np.random.default_rng(0)
    for name, shape in (("wide.png", (12, 24)), ("tall.png", (24, 12))):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / name)
    generate("--prompt", "a", "--image", tmp_path / "wide.png", "--out", tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size == (8, 4)
    (tmp_path / "p.jsonl").write_text('"a"\n{"prompt": "b", "images": ["tall.png"]}\n')
    generate("--prompts", tmp_path / "p.jsonl", "--image", tmp_path / "wide.png", "--image", tmp_path / "tall.png",
             "--size", "4x4", "--out", tmp_path / "out")  # fmt: skip
    assert [len(request.conditions) for requests, _ in sampled for request in requests] == [3, 5, 3]
    first, second = read_manifest(tmp_path / "out").values()
    assert first["images"] == [str(tmp_path / "wide.png"), str(tmp_path / "tall.png")]
    assert second["images"] == [str(tmp_path / "tall.png")]
    assert second["image_fingerprints"] == first["image_fingerprints"][1:]


def test_an_interrupted_run_goes_on(generate, tmp_path, monkeypatch, sampled):
    """Every picture is saved when its batch is done; the same command makes the others, and the result is the same."""
    out, decode = tmp_path / "out", pipeline_module.to_image
    base = ("--prompt", "a", "--count", 5, "--batch-size", 2)
    made = []

    def interrupted(image):
        made.append(image)
        if len(made) == 4:
            raise KeyboardInterrupt
        return decode(image)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline_module, "to_image", interrupted)
        result = generate(*base, "--out", out)
    assert result.code == 130
    assert files(out) == [*names(3), "manifest.jsonl"]
    times = [(out / name).stat().st_mtime_ns for name in names(3)]
    sampled.clear()
    result = generate(*base, "--out", out)
    assert [line.endswith("(kept)") for line in result.lines] == [True] * 3 + [False] * 2
    assert sum(len(requests) for requests, _ in sampled) == 2
    assert times == [(out / name).stat().st_mtime_ns for name in names(3)]
    generate(*base, "--out", tmp_path / "whole")
    assert [e["seed"] for e in read_manifest(out).values()] == list(range(5))
    for name in names(5):
        assert np.abs(pixels(out / name) - pixels(tmp_path / "whole" / name)).max() <= 1
    sampled.clear()
    assert len(generate(*base, "--out", out).lines) == 5
    assert sampled == []


def test_other_settings_or_another_model_are_not_the_same_picture(generate, capsys, tmp_path, model_folder):
    out = tmp_path / "out"
    base = ("--prompt", "a", "--out", out)
    generate(*base)
    before = (out / "00000.png").read_bytes()
    cases = [
        (("--seed", 1), "its seed is 0, not 1"),
        (("--steps", 4), "its guidance.num_timesteps is 3, not 4"),
        (("--size", "4x4"), "its size is [8, 8], not [4, 4]"),
        (("--dtype", "bfloat16"), 'its dtype is "float32", not "bfloat16"'),
        (("--model", save_model(tmp_path / "other", seed=1)), "its weights is "),
    ]
    for change, why in cases:
        result = generate(*base, *change)
        fails(result, f"{out / '00000.png'} is there already and is another picture ({why}")
        assert result.err.rstrip().endswith("name another folder, or overwrite")
    assert (out / "00000.png").read_bytes() == before
    same = generate(
        *base, "--model", save_model(tmp_path / "copy"), "--batch-size", 1
    )  # the weights count, not the place
    assert same.lines[0].endswith("(kept)")
    views, tokens = (shutil.copytree(model_folder, tmp_path / name) for name in ("views", "tokens"))
    data = json.loads((views / "data.json").read_text())
    data["latent_view"]["max_size"] = 6
    (views / "data.json").write_text(json.dumps(data))
    train_tokenizer(["a", "another"], 265).save(tokens)
    for changed in (views, tokens):
        fails(generate(*base, "--model", changed), "is another picture (its weights is ")
    assert generate(*base, "--seed", 1, "--overwrite").code == 0
    assert read_manifest(out)["00000.png"]["seed"] == 1
    assert (out / "00000.png").read_bytes() != before


def test_the_autoencoder_counts_as_a_part_of_the_model(model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "m")
    (tmp_path / "m" / "ae.safetensors").write_bytes(b"one")
    (tmp_path / "same").write_bytes(b"one")
    (tmp_path / "other").write_bytes(b"two")

    def weights(kind, autoencoder):
        model = tiny_model()
        latent = dataclasses.replace(model.config.latent, autoencoder=kind)
        pipeline = SimpleNamespace(model=SimpleNamespace(
            config=dataclasses.replace(model.config, latent=latent), parameters=model.parameters
        ))  # fmt: skip
        options = SimpleNamespace(model=tmp_path / "m", autoencoder=autoencoder)
        (entry,) = entries_of([ImageRequest("a", size=(8, 8))], options, pipeline, GuidanceConfig())
        return entry["weights"]

    in_folder = weights("flux", None)
    assert in_folder == weights("flux", tmp_path / "same")
    assert len({in_folder, weights("flux", tmp_path / "other"), weights("pixels", None)}) == 3


def test_foreign_files_stay(generate, tmp_path):
    (tmp_path / "00001.png").write_bytes(b"holiday")
    (tmp_path / "grid.png").write_bytes(b"holiday")
    Image.new("L", (9, 9)).save(tmp_path / "one.png")
    two = ("--prompt", "a", "--prompt", "b", "--out", tmp_path)
    one = ("--prompt", "a", "--out", tmp_path / "one.png")
    fails(generate(*two), "00001.png is there already and is another picture (it is not in the manifest)")
    fails(generate(*one), "one.png is there already; name another, or give --overwrite")
    for grid in ("grid.png", "one.png"):
        result = generate("--prompt", "a", "--prompt", "b", "--out", tmp_path / "new", "--grid", tmp_path / grid)
        fails(result, f"{grid} is there already and is no contact sheet")
    assert files(tmp_path) == ["00001.png", "grid.png", "one.png"]
    assert (tmp_path / "00001.png").read_bytes() == b"holiday"
    for command in (two, one, (*two, "--grid", tmp_path / "grid.png")):
        assert generate(*command, "--overwrite").code == 0
    assert all(Image.open(tmp_path / name).size == (8, 8) for name in ("00001.png", "one.png"))


def test_full_disk(generate, tmp_path, monkeypatch):
    saved, save = [], Image.Image.save

    def full_after_two(self, path, **options):
        saved.append(path)
        if len(saved) > 2:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full_after_two)
        result = generate("--prompt", "a", "--count", 4, "--out", tmp_path / "out")
        fails(result, f"[Errno 28] No space left on device: '{tmp_path / 'out' / '00002.png'}'")
        fails(generate("--prompt", "a", "--out", tmp_path / "one.png"), "[Errno 28] No space left on device")
    assert files(tmp_path / "out") == [*names(2), "manifest.jsonl"]
    assert files(tmp_path) == ["out"]


def test_an_image_that_is_not_finite_is_not_saved(generate, tmp_path):
    pipeline = tiny_pipeline(view=ImageConfig(min_size=4, max_size=8, stride=2))
    torch.nn.init.constant_(pipeline.model.llm2vae.bias, torch.nan)
    pipeline.save(tmp_path / "broken")
    broken = ("--model", tmp_path / "broken", "--prompt", "a", "--out")
    why = "prompt 'a': the model's image is not finite; try another dtype, or another model"
    fails(generate(*broken, tmp_path / "out"), why)
    assert files(tmp_path / "out") == ["manifest.jsonl"]
    assert (tmp_path / "out" / "manifest.jsonl").read_bytes() == b""
    fails(generate(*broken, tmp_path / "a.png"), why)
    assert files(tmp_path) == ["broken", "out"]


def test_a_foreign_manifest_stays(generate, tmp_path):
    for i, content in enumerate((b"notes", b'{"file": "a.png", "caption": "mine"}\n', b'{"image": "a.png"}\n{"im')):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "manifest.jsonl").write_bytes(content)
        result = generate("--prompt", "a", "--out", tmp_path / str(i))
        fails(result, "manifest.jsonl is no manifest of generated pictures; name another folder")
        assert files(tmp_path / str(i)) == ["manifest.jsonl"]
        assert (tmp_path / str(i) / "manifest.jsonl").read_bytes() == content


def test_texts_that_are_none(generate, capsys, tmp_path, model_folder):
    """Bytes of a command line that are not UTF-8, and half a surrogate pair in JSON."""
    (tmp_path / "p.json").write_text('["a", "b\\ud800"]')
    Image.new("L", (8, 8)).save(tmp_path / "x.png")
    fails(generate("--prompt", "a\udcff", "--out", tmp_path / "out"), "text 'a\\udcff' is no Unicode text (a lone surr")
    fails(generate("--prompts", tmp_path / "p.json", "--out", tmp_path / "out"),
          "p.json, entry 1, 'prompt' is 'b\\ud800'; it must be Unicode text")  # fmt: skip
    asked = run_command(capsys, "detect", "--model", model_folder, tmp_path / "x.png", "--question", "a\udcff")
    fails(asked, "text 'a\\udcff' is no Unicode text (a lone surrogate)")


def test_lines_of_results_are_printable_whatever_the_terminal(generate, tmp_path, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", stdout)
    result = generate("--prompt", "süß\x1b[2J 漢", "--out", tmp_path / "a.png")
    assert result.code == 0
    assert stdout.buffer.getvalue() == f"{tmp_path}/a.png\tseed 0\tsüß\\x1b[2J \\u6f22\n".encode("latin-1")


def test_mistakes(generate, tmp_path, monkeypatch):
    (tmp_path / "bad.jsonl").write_text('"a"\n{"prompt": }\n')
    (tmp_path / "keys.json").write_text('[{"prompt": "a", "promt": "b"}]')
    (tmp_path / "seeded.json").write_text('[{"prompt": "a", "seed": 3}]')
    (tmp_path / "large.json").write_text('["a", {"prompt": "b", "size": [16, 8]}]')
    (tmp_path / "long.txt").write_text("short\n" + "x" * 126 + "\n")
    (tmp_path / "empty.txt").write_text("# none\n")
    (tmp_path / "latin.txt").write_bytes(b"fine\ns\xfc\xdf\n")
    (tmp_path / "notes.png").write_text("no image")
    picture, folder = tmp_path / "a.png", tmp_path / "folder"
    one = ("--prompt", "a", "--out", picture)
    files_ = lambda name: ("--prompts", tmp_path / name, "--out", folder)  # noqa: E731
    cases = [
        ((*one, "--count", 2), "a.png is one picture, but 2 images are asked for; name a folder"),
        ((*one, "--seeds", 2, 3), "a.png is one picture, but 2 images are asked for"),
        ((*one, "--count", 0), "--count is 0; it must be at least 1"),
        ((*one, "--count", 1, "--seeds", 3), "--count and --seeds both say"),
        ((*one, "--seed", 1, "--seeds", 3), "--seed and --seeds both say"),
        ((*one, "--seeds", 3, 3), "--seeds names a seed twice: 3 3"),
        ((*one, "--seed", -1), "seed is -1; it must be from 0"),
        ((*one, "--size", "7x8"), "prompt 'a': size is (7, 8); it must be (height, width), multiples of 2 pixels"),
        ((*one, "--size=-2x4"), "multiples of 2 pixels and at most 8"),
        ((*one, "--steps", 1), "num_timesteps is 1; it must be at least 2"),
        ((*one, "--shift", 0), "timestep_shift is 0.0"),
        ((*one, "--interval", 0.9, 0.1), "guidance.interval is (0.9, 0.1); it must be (low, high)"),
        ((*one, "--renorm-min", 2), "renorm_min is 2.0; it must be in [0, 1]"),
        ((*one, "--batch-size", 0), "batch_size is 0"),
        ((*one, "--image", tmp_path / "lost.png"), "lost.png does not exist"),
        ((*one, "--image", tmp_path / "notes.png"), "notes.png cannot be decoded"),
        ((*one, "--grid", tmp_path / "grid.jpg"), "grid.jpg must be a .png file"),
        ((*one, "--grid", picture), "a.png is the name of one of the pictures"),
        (("--prompt", "a", "--out", tmp_path / "a.xyz"), "a.xyz names no picture format; use one of .bmp"),
        (("--prompt", "a", "--prompt", "b", "--out", tmp_path / "notes.png" / "x"), "Not a directory"),
        (("--prompt", "a", "--prompt", "b", "--out", tmp_path / "empty.txt"), "is a file; it must be a folder"),
        ((*files_("seeded.json"), "--grid", folder / "00000.png"), "00000.png is the name of one of the pictures"),
        (files_("lost.txt"), "lost.txt does not exist"),
        (files_("empty.txt"), "empty.txt holds no prompt"),
        (files_("latin.txt"), "latin.txt, line 2 is not UTF-8 text"),
        (files_("bad.jsonl"), "bad.jsonl, line 2 is not JSON"),
        (files_("keys.json"), "keys.json, entry 0 has the unknown keys ['promt']"),
        (files_("large.json"), "large.json, entry 1 ('b'): size is (16, 8); it must be"),
        (files_("long.txt"), f"long.txt, line 2 ('{'x' * 40}…') has 126 tokens; it must have at most 125"),
        ((*files_("seeded.json"), "--seeds", 1, 2), "seeded.json, entry 0 has a seed of its own"),
    ]  # fmt: skip
    for arguments, message in cases:
        fails(generate(*arguments), message)
        assert not picture.exists()
        assert not folder.exists() or files(folder) == []
    StandardInput(monkeypatch, b"\xff")
    fails(generate("--prompts", "-", "--out", folder), "standard input, line 1 is not UTF-8 text")
    monkeypatch.setattr(sys, "stdin", None)
    fails(generate("--prompts", "-", "--out", folder), "--prompts - reads standard input, which is closed")
    both = generate("--prompt", "a", "--prompts", tmp_path / "long.txt", "--out", folder)
    assert (both.code, "not allowed with argument" in both.err) == (2, True)
