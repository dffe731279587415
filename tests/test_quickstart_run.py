"""The whole job with a handful of steps: what it leaves, that a seed decides everything, and that its model is usable.

How well the model learns is not tested here.
"""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from unigendet.cli import main
from unigendet.config_file import load_settings
from unigendet.data import quickstart as quickstart_data
from unigendet.inference.pipeline import Pipeline
from unigendet.quickstart import MARK, PARTS, QuickstartConfig, default_config, run, thin
from unigendet.training.state import checkpoints

STAGE = {
    "ema_decay": 0.5,
    "model": {"preset": "quickstart"},
    "loader": {"max_tokens": 300, "max_sample_tokens": 200},
}
SETTINGS = {
    "fakes_per_real": 1,
    "batch_size": 400,
    "shown": 2,
    "guidance": {"num_timesteps": 2, "text_scale": 1.5, "interval": [0.0, 1.0], "timestep_shift": 1.0},
    "gduf": {**STAGE, "stage": "gduf", "total_steps": 3},
    "diga": {**STAGE, "stage": "diga", "total_steps": 2, "align_layer": 2, "teacher_layer": 3},
}
TESTED = 80  # instead of 397 test images


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    file = tmp_path_factory.mktemp("settings") / "tiny.yaml"
    file.write_text(json.dumps(SETTINGS))  # JSON is YAML
    return file


def run_small(out, settings):
    """One run on fewer test images, on one thread: its results, and what it printed."""
    threads = torch.get_num_threads()
    console = Console(file=io.StringIO(), width=80)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart_data, "_TEST_IMAGES", TESTED)
        torch.set_num_threads(1)
        results = run(out, seed=3, config=settings, console=console)
        torch.set_num_threads(threads)
    return results, console.file.getvalue()


@pytest.fixture(scope="module")
def done(tmp_path_factory, settings):
    """A finished run: its folder, its results, and what it printed."""
    out = tmp_path_factory.mktemp("quickstart") / "out"
    return out, *run_small(out, settings)


def report_of(out):
    return json.loads((out / "report.json").read_text())


def numbers(report):
    """The report without what the clock decides."""
    aims = [aim for aim in report.pop("aims") if aim["name"] != "Time"]
    assert report.pop("durations")["total"] > 0
    return report | {"aims": aims}


def test_leaves_its_folder(done):
    out, _, _ = done
    assert sorted(p.name for p in out.iterdir()) == sorted((*PARTS, MARK))
    for when in ("before", "after"):
        pictures = sorted((out / "samples" / "images" / when).iterdir())
        assert len(pictures) == TESTED
        assert Image.open(pictures[0]).size == (8, 8)
    assert [len(checkpoints(out / stage)) for stage in ("gduf", "diga")] == [1, 1]
    page = (out / "report.html").read_text()
    assert page.lower().startswith("<!doctype html>")


def test_report_holds_every_number(done):
    out, results, _ = done
    report = report_of(out)
    assert report["seed"] == 3
    assert report["settings"]["quickstart"]["gduf"]["total_steps"] == 3
    assert [aim["name"] for aim in report["aims"]] == [
        "Prompt agreement",
        "Balanced accuracy, seen generator",
        "Balanced accuracy, held-out generator",
        "Fréchet distance",
        "Explanation ROUGE-L",
        "Verdict and explanation agree",
        "Time",
    ]
    assert all(aim["value"] is not None for aim in report["aims"])
    assert [len(report["curves"][stage]) for stage in ("GDUF", "DIGA")] == [3, 2]
    assert report["curves"]["DIGA"][0].keys() == {"step", "loss", "mse", "diga"}
    groups = {group["group"]: group["count"] for group in report["detection"]["groups"]}
    assert groups == dict.fromkeys(("real", "gaussian_mixture", "kernel_density", "unigendet"), TESTED)
    assert report["agreement"].keys() == {"before DIGA", "after DIGA"}
    assert report["frechet"].keys() == {"before DIGA", "after DIGA", "gaussian_mixture", "kernel_density"}
    assert {tuple(grid["rows"]) for grid in report["grids"]} == {results.grids[0].rows}
    assert [grid.images.shape for grid in results.grids] == [(10, 2, 8, 8)] * 3
    assert all(point["loss"] > 0 for stage in report["curves"].values() for point in stage)


def test_says_what_it_does_and_ends_with_the_tables(done):
    out, _, text = done
    announced = [
        "Writing digits",
        "GDUF: a model of",
        f"Generating {TESTED} digits, before DIGA",
        "DIGA: the frozen detector",
    ]
    announced += ["Judging and explaining", "Writing the report", "Balanced accuracy, held-out generator", "ROUGE-L"]
    places = [text.index(words) for words in announced]
    assert places == sorted(places)
    assert text.replace("\n", "").endswith(f"The report: {out / 'report.html'}")


def test_the_same_seed_gives_the_same_numbers(done, tmp_path):
    """Also when somebody watches. The second run replaces the first one's folder."""
    out, first, _ = done
    before = numbers(report_of(out))
    picture = np.asarray(Image.open(out / "samples/images/after/00000.png"))
    watch = {"every": 2, "count": 2, "limit": 20}
    stages = {name: {**SETTINGS[name], "watch": watch} for name in ("gduf", "diga")}
    (tmp_path / "watched.yaml").write_text(json.dumps({**SETTINGS, **stages}))
    second, text = run_small(out, tmp_path / "watched.yaml")
    after = numbers(report_of(out))
    for name, steps in (("gduf", [0, 2, 3]), ("diga", [0, 2])):
        rows = [json.loads(line) for line in (out / name / "watch.jsonl").read_text().splitlines()]
        assert [(row["step"], row["images"]) for row in rows] == [(step, 20) for step in steps]
        assert Image.open(out / name / rows[0]["samples"]).size == (2 * 72 - 8, 10 * 72 - 8)
        assert f"{name}  step 2/{steps[-1]}  held out: accuracy" in text
    assert before.pop("settings") != after.pop("settings")
    assert after == before
    assert np.array_equal(picture, np.asarray(Image.open(out / "samples/images/after/00000.png")))
    assert all(np.array_equal(a.images, b.images) for a, b in zip(first.grids, second.grids, strict=True))


def test_its_models_are_usable(done, capsys):
    """The saved model, and the checkpoints of both stages."""
    out, _, _ = done
    picture = out / "data" / "images" / "test_real" / "00000.png"
    folders = [out / "model"]
    folders += [c / part for stage in ("gduf", "diga") for c in checkpoints(out / stage) for part in ("model", "ema")]
    for folder in folders:
        assert main(["detect", "--model", str(folder), str(picture), "--format", "jsonl", "--max-tokens", "4"]) == 0
        line = json.loads(capsys.readouterr().out)
        assert line["path"] == str(picture)
        assert line["verdict"] in ("real", "fake")
    one = out.parent / "seven.png"
    assert main(["generate", "--model", str(folders[0]), "--prompt", "seven", "--steps", "2", "--out", str(one)]) == 0
    assert Image.open(one).size == (8, 8)


def test_saved_model_has_the_averaged_weights(done):
    out, _, _ = done
    saved = Pipeline.from_pretrained(out / "model").model.state_dict()
    (checkpoint,) = checkpoints(out / "diga")
    for part, same in (("ema", True), ("model", False)):
        weights = Pipeline.from_pretrained(checkpoint / part).model.state_dict()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in saved.items()) == same


@pytest.mark.parametrize("what", ["file among ours", "only foreign", "no folder"])
def test_refuses_a_folder_that_is_not_its_own(tmp_path, settings, capsys, what):
    out = tmp_path / "out"
    if what == "no folder":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
    if what == "file among ours":
        (out / "data").mkdir()
        (out / "data" / "x").write_text("")
    assert main(["quickstart", "--out", str(out), "--config", str(settings)]) == 1
    message = capsys.readouterr().err
    assert ("is a file" if what == "no folder" else "holds thesis.txt") in message
    assert "Traceback" not in message
    if what != "no folder":
        assert (out / "thesis.txt").read_text() == "mine"
        assert (out / "data").exists() == (what == "file among ours")


def test_a_folder_with_our_names_but_not_our_mark_is_kept(tmp_path, settings, capsys):
    for name in ("data", "model"):
        (tmp_path / "project" / name).mkdir(parents=True)
        (tmp_path / "project" / name / "x").write_text("mine")
    assert main(["quickstart", "--out", str(tmp_path / "project"), "--config", str(settings)]) == 1
    assert "holds data, model" in capsys.readouterr().err
    assert all((tmp_path / "project" / name / "x").read_text() == "mine" for name in ("data", "model"))


def test_a_bad_seed_leaves_an_earlier_result(done, settings, capsys):
    out, _, _ = done
    assert main(["quickstart", "--out", str(out), "--seed", "-1", "--config", str(settings)]) == 1
    assert "seed is -1; it must be at least 0" in capsys.readouterr().err
    assert (out / "report.json").is_file()


def test_shipped_settings():
    """They load, and both stages train the same model."""
    config = load_settings(QuickstartConfig, default_config())
    assert config.gduf.model == config.diga.model
    assert (config.gduf.stage, config.diga.stage) == ("gduf", "diga")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("gduf.stage=diga", "gduf.stage is 'diga'; it must be 'gduf'"),
        ('gduf.model={"preset": null, "checkpoint": "somewhere"}', "gduf.model.checkpoint is 'somewhere'"),
        ("batch_size=0", "batch_size is 0; it must be positive"),
        ("gduf.total_stops=3", "total_stops"),
    ],
)
def test_settings_that_do_not_fit(settings, override, message):
    with pytest.raises(ValueError, match=message):
        load_settings(QuickstartConfig, settings, [override])


def test_thin():
    history = [{"step": i + 1, "loss": float(i), "lr": 1.0, "seconds": 2.0, "tokens": 9} for i in range(10)]
    assert thin(history, 5) == [{"step": 2 * i + 2, "loss": 2 * i + 0.5} for i in range(5)]
    assert thin(history, 4)[-1] == {"step": 10, "loss": 9.0}  # the last of 3, 3, 3 and 1
    assert thin(history) == [{"step": r["step"], "loss": r["loss"]} for r in history]
    assert thin([]) == []
