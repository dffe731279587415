"""The commands: what they print and write, their exit codes, and no traceback for a user's mistake."""

import functools
import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path

import pytest
from command_runs import VIEW, run_command
from PIL import Image
from run_data import write_run_data

from unigendet import __version__
from unigendet.cli import NEEDS_EXTRA
from unigendet.inference.pipeline import Pipeline
from unigendet.training.state import checkpoints

COMMANDS = ("quickstart", "train", "generate", "detect", "calibrate", "info")


@pytest.fixture
def cli(capsys):
    return functools.partial(run_command, capsys)


def test_help_and_version(cli):
    result = cli("--help")
    assert result.code == 0
    assert all(name in result.out for name in COMMANDS)
    assert cli("--version").out.strip() == f"unigendet {__version__}"
    options = {"train": "SETTING=VALUE", "generate": "--renorm", "detect": "--no-latent", "info": "--json"}
    options["calibrate"] = "--max-false-alarms"
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
        (["detect", "--model", "m"], "name pictures: PATH, --list, or both"),
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


def test_info_about_the_extras(cli, monkeypatch):
    declared = ["torch>=2.11", "triton>=3.6; sys_platform == 'linux'", 'rich>=13; extra == "train"',
                "no-such-package[signatures]>=4.49; extra == 'train'", "pytest>=8; extra == 'dev'",
                'torch-fidelity>=0.4; python_version > "3" and extra == "fid"']  # fmt: skip
    monkeypatch.setattr("importlib.metadata.requires", lambda _: declared)
    facts = json.loads(cli("info", "--json").out)
    extras = {name: values for name, values in facts.items() if name.startswith("extra")}
    assert {name: list(values) for name, values in extras.items()} == {
        "extra 'train'": ["rich", "no-such-package"], "extra 'fid'": ["torch-fidelity"],
    }  # fmt: skip
    assert extras["extra 'train'"] == {"rich": version("rich"), "no-such-package": "not installed"}


def test_info_where_the_package_is_only_on_the_path(cli, monkeypatch):
    def requires(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.requires", requires)
    result = cli("info", "--json")
    assert result.code == 0
    assert json.loads(result.out)["extras"]["unigendet"].startswith("not installed")


def test_every_package_of_the_training_extra_is_asked_for_by_its_name():
    """An import that fails names a module, an extra packages; what a module's package needs itself may be named too."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extra = {re.match(r"[\w.-]+", package)[0] for package in project["optional-dependencies"]["train"]}
    known = packages_distributions()
    homes = {name: known[name][0].lower().replace("_", "-") for name in NEEDS_EXTRA}
    assert set(homes.values()) - extra == {"markupsafe"}  # of jinja2
    assert extra <= set(homes.values())


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
        "for name in ('PIL', 'tokenizers', 'safetensors', 'jsonargparse', 'rich', 'transformers', 'diffusers',"
        "             'scipy', 'sklearn', 'matplotlib'):\n"
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
        result = cli("detect", "--model", folder, run_file.parent / "1.png", "--format", "jsonl", "--max-tokens", 3)
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


def test_a_reader_that_has_seen_enough():
    """``unigendet info | head -1``: quiet, as ``ls | head -1`` is."""
    command = [sys.executable, "-m", "unigendet", "info"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1
