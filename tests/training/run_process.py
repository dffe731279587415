"""``unigendet train`` as a process of its own, on tiny data, and what such a run leaves."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from run_data import write_run_data, write_run_settings
from safetensors.torch import load_file

import unigendet
from unigendet.training.metrics import TIMING

PACKAGE = Path(unigendet.__file__).parent
WRAPPER = Path(__file__).parent / "wrapped_run.py"


def write_run(folder, **settings):
    """Data and ``run.yaml`` in ``folder``; the output goes to ``folder/out``. Returns the YAML file."""
    write_run_data(folder)
    defaults = {
        "total_steps": 6,
        "log_every": 1,
        "optimizer": {"lr": 1e-3, "warmup_steps": 1, "schedule": "cosine"},
    }
    return write_run_settings(folder / "run.yaml", folder, folder / "out", **defaults | settings)


def start(*arguments, wrapped=(), **options):
    """Start the command; ``wrapped``: arguments of ``wrapped_run.py``, which does something to it meanwhile."""
    program = [sys.executable, str(WRAPPER), *wrapped] if wrapped else [sys.executable, "-m", "unigendet"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PACKAGE.parent)}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen([*program, *map(str, arguments)], env=environment, **options)


def finish(process):
    """Wait for its end; (exit code, standard error)."""
    out, err = process.communicate()
    assert out == ""
    return process.returncode, err


def run(*arguments, wrapped=()):
    """Run the command to its end; (exit code, standard error)."""
    return finish(start(*arguments, wrapped=wrapped))


def killed(code):
    """Whether a process ended by SIGKILL."""
    return code == -signal.SIGKILL


def same_state(left, right):
    """Two checkpoint folders hold the same files, bit for bit but for the output folder that the settings name."""
    names = [sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) for folder in (left, right)]
    assert names[0] == names[1]
    for name in names[0]:
        if name.endswith(".safetensors"):
            a, b = load_file(left / name), load_file(right / name)
            assert a.keys() == b.keys()
            assert all(torch.equal(a[key], b[key]) for key in a), name
        elif name == "training.json":
            a, b = (json.loads((folder / name).read_text()) for folder in (left, right))
            assert a.pop("settings").keys() == b.pop("settings").keys()
            assert a == b
        else:
            assert (left / name).read_bytes() == (right / name).read_bytes(), name


def history(output):
    """The rows of the metric file without what the clock says."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMING} for row in rows]
