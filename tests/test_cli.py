"""The commands: what they print and write, their exit codes, and no traceback for a user's mistake."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from run_data import ANSWERS, write_run_data
from tiny_models import tiny_model

from unigendet import __version__
from unigendet.cli import main
from unigendet.config import DataConfig, ImageConfig
from unigendet.data.tokenizer import load_tokenizer, train_tokenizer
from unigendet.inference.pipeline import Pipeline
from unigendet.model.autoencoder import PixelAutoencoder
from unigendet.training.state import checkpoints

COMMANDS = ("quickstart", "train", "generate", "detect", "info")
VIEW = ImageConfig(min_size=8, max_size=8, stride=2)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    model = tiny_model(vocab_size=280)
    tokenizer = train_tokenizer(ANSWERS, 270)
    Pipeline(model, tokenizer, PixelAutoencoder(model.config.latent), DataConfig(VIEW, VIEW)).save(folder)
    return folder


@pytest.fixture
def pictures(tmp_path):
    """Three pictures, one of them in a folder below, and a file that is none."""
    folder, rng = tmp_path / "pictures", np.random.default_rng(0)
    (folder / "more").mkdir(parents=True)
    for name in ("b.png", "a.JPG", "more/c.webp"):
        Image.fromarray(rng.integers(0, 256, (12, 9, 3), dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


class Result:
    def __init__(self, code, captured):
        self.code, self.out, self.err = code, captured.out, captured.err
        self.lines = self.out.splitlines()
        assert "Traceback" not in self.err


@pytest.fixture
def cli(capsys):
    def run(*arguments):
        capsys.readouterr()
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as end:
            code = end.code
        return Result(code, capsys.readouterr())

    return run


def test_help_and_version(cli):
    result = cli("--help")
    assert result.code == 0
    assert all(name in result.out for name in COMMANDS)
    assert cli("--version").out.strip() == f"unigendet {__version__}"
    options = {"train": "SETTING=VALUE", "generate": "--renorm", "detect": "--no-latent", "info": "--json"}
    for name in COMMANDS:
        result = cli(name, "--help")
        assert result.code == 0
        assert options.get(name, "--seed") in result.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["fly"], "invalid choice"),
        (["detect", "x.png"], "required: --model"),
        (["detect", "--model", "m"], "required: PATH"),
        (["generate", "--model", "m", "--out", "o"], "one of the arguments --prompt --prompts is required"),
        (["info", "--speed", "9"], "unrecognized arguments: --speed 9"),
        (["detect", "--model", "m", "x.png", "--speed"], "unrecognized arguments: --speed"),
        (["generate", "--model", "m", "--prompt", "p", "--out", "o", "--size", "big"], "'big' is no size"),
        (["generate", "--model", "m", "--prompt", "p", "--out", "o", "--renorm", "none"], "invalid choice"),
        (["train", "total_steps=2"], "required: --config"),
        (["train", "--config", "f", "total_steps"], "'total_steps' is no setting; write NAME=VALUE"),
        (["train", "--config", "f", "=2"], "'=2' is no setting"),
        (["train", "--config", "f", "--optimizer.lr=1"], "unrecognized arguments: --optimizer.lr=1"),
    ],
)
def test_wrong_command_lines_end_with_2(cli, arguments, message):
    result = cli(*arguments)
    assert result.code == 2
    assert message in result.err
    assert result.out == ""


def test_info(cli):
    facts = json.loads(cli("info", "--json").out)
    assert facts["versions"]["unigendet"] == __version__
    assert "cpu" in facts["devices"]
    assert {"reference", "torch"} <= set(facts["ops (backends built)"]["symbiotic_attention"])
    assert facts["compiled extension"]["unigendet._C"].startswith(("built by ", "not built"))
    result = cli("info")
    assert result.code == 0
    assert re.search(rf"^  torch +{re.escape(facts['versions']['torch'])}$", result.out, re.MULTILINE)


def test_info_about_the_extension(cli, monkeypatch):
    monkeypatch.setattr("unigendet.ops.backends.extension_facts", lambda: {"problem": "not built: no compiler"})
    assert json.loads(cli("info", "--json").out)["compiled extension"] == {"unigendet._C": "not built: no compiler"}
    facts = {"compiler": "c++ 1", "isa_levels": ["fast", "baseline"], "usable_isa_levels": ["baseline"],
             "cuda_archs": ["sm_80"], "nvcc": "release 13"}  # fmt: skip
    monkeypatch.setattr("unigendet.ops.backends.extension_facts", lambda: facts)
    shown = json.loads(cli("info", "--json").out)["compiled extension"]
    assert shown == {
        "unigendet._C": "built by c++ 1",
        "instruction set in use": "baseline (of fast, baseline)",
        "cuda": ["sm_80", "by release 13"],
    }


def test_without_the_training_extra():
    """``info`` and ``--help`` need no more than the package itself; other commands say what to install."""
    code = (
        "import sys\n"
        "for name in ('PIL', 'tokenizers', 'safetensors', 'jsonargparse', 'rich', 'transformers', 'diffusers'):\n"
        "    sys.modules[name] = None\n"
        "from unigendet.cli import main\n"
        "print(main(['info']), main(['detect', '--model', 'm', '.']), main(['quickstart']), main(['train', '--config', "
        "'f']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "0 1 1 1"
    lines = done.stderr.splitlines()
    assert len(lines) == 3
    assert all(re.search(r"needs the package '\w+': pip install 'unigendet\[train\]'$", line) for line in lines)


def test_detect_writes_a_line_per_picture(cli, model_folder, pictures):
    result = cli("detect", "--model", model_folder, pictures, pictures / "b.png", "--max-tokens", 4)
    assert (result.code, result.err) == (0, "")
    rows = [line.split("\t") for line in result.lines]
    names = ["a.JPG", "b.png", "more/c.webp", "b.png"]  # a folder's are sorted
    assert [row[2] for row in rows] == [str(pictures / name) for name in names]
    assert {row[0] for row in rows} <= {"real", "fake"}
    assert all((float(row[1]) >= 0.5) == (row[0] == "real") for row in rows)
    assert rows[1] == rows[3]
    assert all(len(row) == 4 for row in rows)


def test_detect_json(cli, model_folder, pictures):
    plain = cli("detect", "--model", model_folder, pictures, "--max-tokens", 4, "--batch-size", 2)
    result = cli("detect", "--model", model_folder, pictures, "--max-tokens", 4, "--json")
    entries = [json.loads(line) for line in result.lines]
    assert all(list(entry) == ["path", "verdict", "probability_real", "explanation"] for entry in entries)
    rows = [line.split("\t") for line in plain.lines]
    for entry, row in zip(entries, rows, strict=True):
        assert [entry["verdict"], f"{entry['probability_real']:.3f}", entry["path"]] == row[:3]
        assert " ".join(entry["explanation"].split()) == row[3]
    bare = cli(
        "detect", "--model", model_folder, pictures, "--max-tokens", 0, "--json", "--no-latent", "--question", "?"
    )
    other = [json.loads(line) for line in bare.lines]
    assert [entry["explanation"] for entry in other] == [""] * 3
    assert all(a["probability_real"] != b["probability_real"] for a, b in zip(entries, other, strict=True))


def test_detect_without_a_head(cli, tmp_path, pictures, model_folder):
    model = tiny_model(vocab_size=280, class_head=False)
    tokenizer = load_tokenizer(model_folder)
    Pipeline(model, tokenizer, PixelAutoencoder(model.config.latent), DataConfig(VIEW, VIEW)).save(tmp_path / "m")
    result = cli("detect", "--model", tmp_path / "m", pictures / "b.png", "--max-tokens", 2)
    assert result.lines[0].startswith(f"undecided\t-\t{pictures / 'b.png'}\t")
    result = cli("detect", "--model", tmp_path / "m", pictures / "b.png", "--max-tokens", 2, "--json")
    assert json.loads(result.out)["probability_real"] is None


def test_a_broken_picture_does_not_stop_the_others(cli, model_folder, pictures):
    (pictures / "ab.png").write_bytes(b"no picture at all")
    cut = (pictures / "b.png").read_bytes()
    (pictures / "more" / "cut.png").write_bytes(cut[: len(cut) // 2])
    broken = [str(pictures / "ab.png"), str(pictures / "more" / "cut.png")]
    result = cli("detect", "--model", model_folder, pictures, "--max-tokens", 2)
    assert result.code == 1
    assert [line.split("\t")[2] for line in result.lines] == [
        str(pictures / n) for n in ("a.JPG", "b.png", "more/c.webp")
    ]
    assert [
        re.search(r"not judged: image (.*?) cannot be decoded", line)[1] for line in result.err.splitlines()
    ] == broken
    result = cli("detect", "--model", model_folder, pictures, "--max-tokens", 2, "--json")
    entries = [json.loads(line) for line in result.lines]
    assert result.code == 1
    assert [entry["path"] for entry in entries if "error" in entry] == broken
    assert len([entry for entry in entries if "verdict" in entry]) == 3


def test_detect_mistakes(cli, model_folder, pictures, tmp_path):
    (tmp_path / "empty").mkdir()
    cases = [
        (["--model", tmp_path / "nowhere", pictures], "no model folder at"),
        (["--model", tmp_path / "empty", pictures], "no weights in"),
        (["--model", model_folder, tmp_path / "lost.png"], "there is no file or folder"),
        (["--model", model_folder, tmp_path / "empty"], "no images in"),
        (["--model", model_folder, pictures, "--batch-size", 0], "batch_size is 0"),
        (["--model", model_folder, pictures, "--max-tokens", -1], "max_new_tokens is -1"),
        (["--model", model_folder, pictures, "--device", "warp"], "device is 'warp'; it must be"),
        (["--model", model_folder, pictures, "--autoencoder", "ae.safetensors"], "must be None with"),
    ]
    for arguments, message in cases:
        result = cli("detect", *arguments)
        assert (result.code, result.out) == (1, "")
        assert result.err.startswith("unigendet detect: ")
        assert message in result.err
        assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "data.json",
        "generation.json",
        "model.safetensors.index.json",
    ],
)
def test_a_damaged_model_folder_is_named(cli, model_folder, pictures, tmp_path, name):
    shutil.copytree(model_folder, tmp_path / "m")
    for damaged in (b"{damaged", b"[]", b"{"):
        (tmp_path / "m" / name).write_bytes(damaged)
        result = cli("detect", "--model", tmp_path / "m", pictures)
        assert (result.code, result.out) == (1, "")
        assert str(tmp_path / "m" / name) in result.err


def test_traceback_on_request(cli, tmp_path):
    with pytest.raises(FileNotFoundError):
        cli("train", "--traceback", "--config", tmp_path / "lost.yaml")


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    """A run's YAML file with its data: six images, annotated for both tasks, and a tokenizer."""
    folder = tmp_path_factory.mktemp("run")
    write_run_data(folder)
    (folder / "run.yaml").write_text(
        f"""
total_steps: 2
device: cpu
output: {folder}/out
model: {{preset: quickstart, tokenizer: {folder}/tokenizer}}
datasets:
  detection: [{{file: {folder}/detection.json}}]
  captions: [{{file: {folder}/captions.json}}]
  views:
    latent_view: {{min_size: 8, max_size: 8, stride: 2}}
    vit_view: {{min_size: 8, max_size: 8, stride: 2}}
    question: Real?
loader: {{max_tokens: 120, max_sample_tokens: 100}}
"""
    )
    return folder / "run.yaml"


def test_train_then_detect_and_generate_from_its_checkpoint(cli, run_file, tmp_path):
    out = tmp_path / "out"
    result = cli("train", "--config", run_file, f"output={out}", "optimizer.lr=1e-3")
    assert (result.code, result.out) == (0, "")
    (checkpoint,) = checkpoints(out)
    assert json.loads((checkpoint / "training.json").read_text())["settings"]["optimizer"]["lr"] == 1e-3
    for folder in (checkpoint / "model", checkpoint / "ema"):
        pipeline = Pipeline.from_pretrained(folder)
        assert pipeline.data.question == "Real?"
        assert pipeline.data.latent_view == VIEW
        result = cli("detect", "--model", folder, run_file.parent / "1.png", "--json", "--max-tokens", 3)
        assert json.loads(result.out)["verdict"] in ("real", "fake")
        picture = tmp_path / f"{folder.name}.png"
        result = cli("generate", "--model", folder, "--prompt", "picture", "--out", picture, "--steps", 2)
        assert result.code == 0
        assert Image.open(picture).size == (8, 8)


def test_train_resumes(cli, run_file, tmp_path):
    setting = f"output={tmp_path / 'out'}"
    base = ["train", "--config", run_file, setting, "optimizer.warmup_steps=0"]
    assert cli(*base, "total_steps=1").code == 0
    result = cli(*base)
    assert result.code == 1
    assert "holds checkpoints of another run; resume it" in result.err
    assert cli(*base, "--resume").code == 0
    # Settings may stand in several places, and the folder may be named.
    result = cli(*base, "--resume", checkpoints(tmp_path / "out")[0], "total_steps=3")
    assert result.code == 1
    assert "holds later checkpoints: step-000002" in result.err
    assert cli(*base, "--resume", checkpoints(tmp_path / "out")[-1], "total_steps=3").code == 0
    steps = [json.loads((path / "training.json").read_text())["step"] for path in checkpoints(tmp_path / "out")]
    assert steps == [2, 3]


def test_train_mistakes(cli, run_file, tmp_path):
    (tmp_path / "odd.yaml").write_text("total_steps: [")
    cases = [
        (["--config", tmp_path / "lost.yaml"], "lost.yaml does not exist"),
        (["--config", tmp_path / "odd.yaml"], "odd.yaml"),
        (["--config", run_file, "total_stops=3"], "total_stops"),
        (["--config", run_file, "total_steps=many"], "total_steps"),
        (["--config", run_file, "total_steps=0"], "total_steps is 0; it must be positive"),
        (["--config", run_file, f"output={tmp_path}/out", "--resume"], "nothing to resume"),
        (["--config", run_file, "--resume", tmp_path / "lost"], "no checkpoint at"),
        (["--config", run_file, "model.preset=null", "model.checkpoint=lost"], "lost"),
        (["--config", run_file, "datasets.captions=[{file: lost.json}]"], "lost.json does not exist"),
        (
            ["--config", run_file, "device=cuda:99"],
            "device is 'cuda:99'; it must be 'auto' or a device of this machine",
        ),
    ]
    for arguments, message in cases:
        result = cli("train", *arguments)
        assert (result.code, result.out) == (1, "")
        assert result.err.startswith("unigendet train: ")
        assert message in result.err
    assert not (tmp_path / "out").exists()
