"""A run's data and settings to check, and the check itself."""

import json

from command_runs import run_command
from PIL import Image
from run_data import write_run_data, write_run_settings


def write_checked_data(folder):
    """Six images of several sizes, in both data sets of the settings ``run.yaml``; returns ``folder``."""
    write_run_data(folder)
    for i, size in enumerate([(8, 8), (4, 8), (8, 6), (8, 4), (30, 30), (6, 6)]):
        Image.new("L", size, i).save(folder / f"{i}.png")
    view = {"min_size": 2, "max_size": 8, "stride": 2}
    datasets = {
        "detection": [{"file": str(folder / "detection.json")}],
        "captions": [{"file": str(folder / "captions.json"), "weight": 2}],
        "views": {"latent_view": view, "vit_view": view},
    }
    write_run_settings(folder / "run.yaml", folder, None, datasets=datasets)
    return folder


def check_data(capsys, folder, *arguments, workers=0):
    """Run ``unigendet data check`` on it; its result and what it wrote as JSON."""
    out = folder / "out.json"
    out.unlink(missing_ok=True)
    options = ["--workers", workers, "--json", out, *arguments]
    result = run_command(capsys, "data", "check", folder / "run.yaml", *options)
    return result, json.loads(out.read_text()) if out.exists() else None


def annotate(folder, kind, i, **values):
    """Change entry ``i`` of an annotation file."""
    file = folder / f"{kind}.json"
    entries = json.loads(file.read_text())
    entries[i].update(values)
    file.write_text(json.dumps(entries))
